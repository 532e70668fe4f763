"""numpy-only regeneration of rule-based parameters: load_params('dev/kl16.json') -> {torch_key: float32 array}."""
import json
import math
import zlib

import numpy as np


def gen_param(seed, key, shp, gain=1.0, overrides=None):
    o = (overrides or {}).get(key)
    g = np.random.Generator(np.random.PCG64([seed, zlib.crc32(key.encode())]))
    shp = tuple(shp); leaf = key.split(".")[-1]
    fan = math.sqrt(int(np.prod(shp[1:]))) if len(shp) > 1 else 1.0
    if o is not None:
        if "const" in o: a = np.full(shp, o["const"])
        elif "std" in o: a = o["std"] * g.normal(size=shp)
        else: a = o["gain"] * g.normal(size=shp) / fan
    elif leaf == "running_var": a = g.uniform(0.5, 1.5, shp)
    elif leaf == "running_mean": a = g.normal(0, 0.1, shp)
    elif len(shp) == 1 and leaf == "weight": a = 1.0 + 0.2 * g.normal(size=shp)
    elif len(shp) <= 1: a = 0.1 * g.normal(size=shp)
    else: a = gain * g.normal(size=shp) / fan
    return np.asarray(a, np.float64).astype(np.float32)

def load_params(json_path, check=True):
    r = json.load(open(json_path))["params_rule"]; out = {}
    for k, s in r["shapes"].items():
        if k in r["int_keys"]:
            out[k] = np.zeros(s, np.int32); continue
        out[k] = gen_param(r["seed"], k, s, r["gain"], r["overrides"])
        if check and zlib.crc32(out[k].tobytes()) != r["params_crc32"][k]:
            raise ValueError("checksum mismatch for " + k)
    return out
