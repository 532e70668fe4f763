"""Squares of a row-major grid of tokens joined into one token each, and back."""

from jaxtyping import Array, Float


def patchify(tokens_BND: Float[Array, "B N D"], patch_size: int) -> Float[Array, "B n d"]:
    """Join each patch_size x patch_size square of a row-major grid into one token, channels major (c, p, q)."""
    if patch_size == 1:
        return tokens_BND
    B, N, D = tokens_BND.shape
    side = round(N**0.5) // patch_size
    squares = tokens_BND.reshape(B, side, patch_size, side, patch_size, D)
    return squares.transpose(0, 1, 3, 5, 2, 4).reshape(B, side * side, D * patch_size**2)


def unpatchify(patches_Bnd: Float[Array, "B n d"], patch_size: int) -> Float[Array, "B N D"]:
    """Undo `patchify`."""
    if patch_size == 1:
        return patches_Bnd
    B, n, d = patches_Bnd.shape
    side = round(n**0.5)
    squares = patches_Bnd.reshape(B, side, side, d // patch_size**2, patch_size, patch_size)
    return squares.transpose(0, 1, 4, 2, 5, 3).reshape(B, n * patch_size**2, d // patch_size**2)
