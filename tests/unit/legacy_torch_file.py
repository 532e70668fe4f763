"""A file as torch 2.13 writes it with `_use_new_zipfile_serialization=False`: the format of torch before 2020.

It holds an OrderedDict with metadata: `lin0.model.1.weight` to `lin4…` float32 [1, 2, 1, 1] of (i + 0.5, -i), `count`
int64 (), `transposed` float16 [3, 2], a view with strides of 0 to 5.
"""

import base64
import zlib

CONTENT = zlib.decompress(
    base64.b64decode(
        "eNp109lu00AUANDx0oQaCoWylbXsDotxlmaBQkMpFZJZzYtfkHHtoTZy7Vx7XARSpDxVwBMfwAfwF/R3+AQkHriJkzYObqQ4vjPj"
        "e248d3r8N8n/+2Ptz8KHn6/mlR7//LeA1y4Q2ZglhHSikIV26JtbNIq9MAAOFxgzOON7jPnUpIHjWQHwXwwJB9mnDjVj7zONQeiC"
        "KBtTOBi7YcRgSuMNASMvYFDQREPs5wiDDShqYpKgaSPjU5uhEksvI4dG1Fn1bCYBKenAycbcQA1UZTN0qK+UlY/U23AZ8DYLI9tV"
        "zIR5fiyZEV1PPN8xGQ3iMDK3KhIIsmwU+6XgSmuDgpg+Iq35ocXepIMSTBmHcU2rplZaLbXeKldVtQmFQdV2J8FC+RcMDrzWiKxx"
        "Go9fjsG0nN7176Wvbr/UgwwO6TAzqrc8We9hF8txRfc/rq6qcMRNmdksc3SMOZYycwyO63BixFQmmZO5TLNebTYqcGrInM4y82PM"
        "mZQ5y+CcDudHTHWSubAPs6hWanBxyCxkmUtjzOWUucLgqg7XRkxtkrm+D1MvN+pwY8jIWaY0xtxMmVsMbutwZ9CXdphgLypp4mFD"
        "PMOO3O2HuxNWA3cIVLQ4tMpolUpp1gqDqg619AhEVhB3wpg6sJhJ/dTy3++mrmf3vtoqqzVoYOoCpm5iak3Q+G1oYfHCNtxLmfsM"
        "lnR4kHThoTGNj5ublFmOxSxYHsy3DRwk8KgLK4NuH53ZxxoXx/E6nrG3/XOd0w5c3ubxea9ayHsnYt7ByW3vQt7/LlKFJ6PPQhsv"
        "O3vxO4zbY/F3jHs73DAqDn/35slyNt7BuPersDe/RNpkhaySJ/8AXm4v/g=="
    )
)
