"""Counted FLOPs against products and convolutions done by hand, through every kind of loop and transformation."""

import jax
import jax.numpy as jnp
import pytest

from ear_jax.nn.flops import count_equations, count_flops

A, B = jax.ShapeDtypeStruct((3, 5), jnp.float32), jax.ShapeDtypeStruct((5, 7), jnp.float32)
PRODUCT = 2 * 3 * 5 * 7


def test_a_product_is_two_operations_a_multiply_add():
    assert count_flops(jnp.matmul, A, B) == PRODUCT
    assert count_flops(lambda a, b: (jnp.exp(a) + 1) @ b + 2, A, B) == PRODUCT
    assert count_equations(jax.make_jaxpr(jnp.matmul)(A, B)) == PRODUCT


def test_batched_products_count_every_matrix():
    left, right = jax.ShapeDtypeStruct((4, 3, 5), jnp.float32), jax.ShapeDtypeStruct((4, 5, 7), jnp.float32)
    assert count_flops(jnp.matmul, left, right) == 4 * PRODUCT
    assert count_flops(jax.vmap(jnp.matmul, in_axes=(0, None)), left, B) == 4 * PRODUCT


@pytest.mark.parametrize(("groups", "stride", "side"), [(1, 1, 8), (2, 1, 8), (1, 2, 4)])
def test_convolutions_count_every_output_pixel(groups, stride, side):
    images = jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, 4 // groups, 6), jnp.float32)

    def convolve(x, k):
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, k, (stride, stride), "SAME", dimension_numbers=dims, feature_group_count=groups
        )

    assert count_flops(convolve, images, kernel) == 2 * (2 * side * side * 6) * (3 * 3 * 4 // groups)


def test_scans_are_multiplied_out_also_nested_and_under_jit():
    square = jax.ShapeDtypeStruct((6, 6), jnp.float32)

    def inner(x):
        return jax.lax.scan(lambda c, _: (c @ c, None), x, None, length=3)[0]

    def outer(x):
        return jax.lax.scan(lambda c, _: (jax.jit(inner)(c), None), x, None, length=4)[0]

    assert count_flops(outer, square) == 4 * 3 * 2 * 6**3


def test_a_branch_counts_as_its_most_expensive_side_and_a_while_loop_as_one_round():
    square, flag = jax.ShapeDtypeStruct((6, 6), jnp.float32), jax.ShapeDtypeStruct((), jnp.bool_)
    branch = lambda p, x: jax.lax.cond(p, lambda y: y @ y @ y, lambda y: y @ y, x)  # noqa: E731
    assert count_flops(branch, flag, square) == 2 * 2 * 6**3
    loop = lambda x: jax.lax.while_loop(lambda c: c.sum() > 0, lambda c: c @ c, x)  # noqa: E731
    assert count_flops(loop, square) == 2 * 6**3


def test_a_backward_pass_costs_two_products_and_rematerialisation_a_third():
    def loss(a, b):
        return jnp.sum(jnp.sin(a @ b) ** 2)

    assert count_flops(jax.grad(loss, argnums=(0, 1)), A, B) == 3 * PRODUCT
    assert count_flops(jax.grad(jax.checkpoint(loss), argnums=(0, 1)), A, B) == 4 * PRODUCT
