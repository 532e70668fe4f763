"""The tables of diffusion processes against the published ones; both families of fixtures name them alike."""

import re

from parity.golden import Golden

from ear_jax.nn.diffusion import make_process, respace

TABLES = {
    "betas": lambda process: process.betas,
    "alphas_cumprod": lambda process: process.alphas_cumprod,
    "timestep_map": lambda process: process.trained_steps,
    "posterior_log_variance_clipped": lambda process: process.posterior_log_variance,
    "posterior_mean_coef1": lambda process: process.posterior_mean_coefficients[0],
    "posterior_mean_coef2": lambda process: process.posterior_mean_coefficients[1],
}


def check_tables(golden: Golden, schedule: str, train_steps: int, sample_steps: int) -> None:
    """Check every output `tab_<process>_<table>`: train, s<N> and gen<N> (evenly respaced), ddim<N> (strided)."""
    for name in golden.outputs:
        match = re.fullmatch(r"tab_(train|s|gen|ddim)(\d*)_(\w+)", name)
        if match is None:
            continue
        process = make_process(schedule, train_steps)
        if match[1] != "train":
            strided = match[1] == "ddim"
            process = respace(schedule, train_steps, int(match[2] or sample_steps), use_integer_stride=strided)
        golden.check(name, TABLES[match[3]](process))
