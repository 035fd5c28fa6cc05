"""Tiny models of every family enter, on the GPU and on the CPU beside it; how far their numbers lie apart leaves.

Logits, log-probs and gradients in float32 and bfloat16, by xla's attention and by cuDNN's, for rows of a shared prompt
with two replies, tight and left-padded, with sliding windows where the family has some; then the sampler against the
scorer, and what a first step must find: KL 0, ratio 1, loss ln 2.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mpo_jax import allocator, sampling, scoring, sharding
from mpo_jax.data import encode
from mpo_jax.data.rows import prompt_slots
from mpo_jax.data.tokenizer import Conventions
from mpo_jax.models import attention, decoder, flash
from mpo_jax.models.config import ModelConfig
from mpo_jax.stages import candidates
from mpo_jax.types import Batch
from run_scripts.benchmarks import programs
from run_scripts.benchmarks.programs import Case
from run_scripts.gpu.result import Part
from tests.models.conftest import _random_model as random_model
from tests.models.test_decoder import P, R, laid_out, replies

FAMILIES = ("llama3", "mistral", "qwen2_window", "qwen3", "gemma2", "gpt_neox", "gpt2")
THREADS = min(8, os.cpu_count() or 1)
EXACT = 2e-4  # relative, float32 with products of full precision; a kernel's order of summing is free
ROUNDED, SLACK = 4.0, 0.005  # bfloat16: so many times what the CPU loses by bfloat16 products alone, and a little
LONG = {"rows": 2, "prompt": 511, "response": 256, "heads": 8, "kv_heads": 2, "head_dim": 64}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--platform", required=True)
    given = parser.parse_args()
    part = Part("numbers", given.out)
    device = jax.devices()[0]
    part.told("device", device.device_kind, note=f"jax {jax.__version__}, platform {device.platform}")
    cpu = jax.devices("cpu")[0]
    families(part, device, cpu)
    with part.each("attention of long rows"):
        long_rows(part, device, cpu)
    mesh = sharding.make_mesh(1, 1, 1, devices=[device])
    with jax.set_mesh(mesh):
        for dtype in ("f32", "auto"):
            with part.each(f"first DPO step, {dtype}"):
                first_dpo_step(part, dtype, mesh)
            with part.each(f"first PPO step, {dtype}"):
                first_ppo_step(part, dtype, mesh)
            with part.each(f"sampler against scorer, {dtype}"):
                sampler(part, dtype, mesh)
    if device.platform == "gpu":
        with part.each("tests under the gpu marker"):
            marked(part)
    return part.finish()


# Families -------------------------------------------------------------------------------------------------------------


def families(part: Part, device: jax.Device, cpu: jax.Device) -> None:
    """All in threads: nearly all of it is compiling, which leaves Python alone."""
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        found = {name: pool.submit(family, name, device, cpu) for name in FAMILIES}
        for name, future in found.items():
            with part.each(name):
                for what, (error, bound, note) in future.result().items():
                    part.at_most(f"{name}: {what}", error, bound, note=note)


def family(name: str, device: jax.Device, cpu: jax.Device) -> dict[str, tuple[float, float, str]]:
    """what -> the largest relative error among logits, log-probs and gradients, its bound, and each of the three."""
    config, weights = random_model(name)
    rows = batch_of_pairs()
    exact = numbers_of(config, weights, rows, cpu)
    mixed = dataclasses.replace(config, dtype="mixed")  # what CPUs can compute of bfloat16
    own = distances(exact, numbers_of(mixed, weights, rows, cpu))
    narrow = mixed if device.platform == "cpu" else dataclasses.replace(config, dtype="bfloat16")
    found = {}
    for each in (config, narrow):
        backends = ["xla"]
        choice = attention.choose("auto", each, device.platform, 1, attention.compute_capability(device))
        backends += ["cudnn"] if choice.backend == "cudnn" else []
        for backend in backends:
            errors = distances(exact, numbers_of(dataclasses.replace(each, attention=backend), weights, rows, device))
            told = ", ".join(f"{what} {error:.1e}" for what, error in errors.items())
            if each.dtype == "float32":
                bound, note = EXACT, told
            else:  # in what is furthest from its own bound
                bound = max(ROUNDED * error + SLACK for error in own.values())
                note = f"{told}; the CPU's mixed: {max(own.values()):.1e}"
            if len(backends) == 1 and each.dtype != "float32":
                note += f"; no cuDNN: {choice.why}"
            found[f"{each.dtype} {backend}"] = max(errors.values()), bound, note
    return found


def batch_of_pairs() -> tuple[jax.Array, ...]:
    """tokens, positions, segments i32 [B,T]: prompts with two replies each, tight and in slots (so left-padded), of an
    odd length, which cuDNN must be helped with."""
    length, pairs = P + 2 * R + 1, replies(2)
    laid = [laid_out(pairs, length, slots)[0] for slots in (False, True)]
    return tuple(np.concatenate(each) for each in zip(*laid, strict=True))


def numbers_of(config: ModelConfig, weights, rows, device: jax.Device) -> dict[str, np.ndarray]:
    """logits at real tokens, log-probs of the replies, and the gradient of their sum in all weights, in one program."""
    batch = whole_batch(rows)

    def compute(weights, batch):
        hidden = decoder.forward(config, weights, batch.tokens, batch.positions, batch.segments)
        logits = decoder.logits(config, weights, hidden)[..., : config.vocab_size]

        def total(weights):
            out = scoring.response_logps(config, weights, batch)
            return jnp.sum(out.logps), out.logps

        gradient, logps = jax.grad(total, has_aux=True)(weights)
        return logits, logps, gradient

    weights = {"params": weights["params"]}
    with jax.default_matmul_precision("highest"):  # or float32 products are TF32's on a GPU
        made = jax.jit(compute)(*jax.device_put((weights, batch), device))
    logits, logps, gradient = jax.device_get(made)
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradient)])
    return {"logits": logits[np.asarray(rows[2]) > 0], "log-probs": logps, "gradients": flat}


def whole_batch(rows) -> Batch:
    tokens, positions, segments = rows
    ids = np.arange(len(tokens), dtype=np.int32)
    return Batch(tokens, positions, segments, ids, ids, np.ones(len(tokens), np.float32), window=2 * R)


def distances(expected: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> dict[str, float]:
    return {what: distance(expected[what], found[what]) for what in expected}


def distance(expected, found) -> float:
    """Of the norms; NaN where anything is."""
    expected, found = (np.asarray(x, np.float64) for x in (expected, found))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


# Long rows ------------------------------------------------------------------------------------------------------------


def long_rows(part: Part, device: jax.Device, cpu: jax.Device) -> None:
    """Attention alone, bfloat16, grouped heads, odd rows of a shared prompt and two replies, with and without a window:
    both backends against float32 on the CPU."""
    length = LONG["prompt"] + 2 * LONG["response"]
    random = np.random.default_rng(0)
    heads = (LONG["heads"], LONG["kv_heads"], LONG["kv_heads"])
    q, k, v = (random.standard_normal((LONG["rows"], length, n, LONG["head_dim"]), np.float32) for n in heads)
    slots = flash.Slots(LONG["prompt"], 2, LONG["response"])
    for window in (None, 100):
        mask = np.broadcast_to(flash.slot_mask(slots, window), (LONG["rows"], length, length))
        expected = attended("float32", "xla", q, k, v, mask, cpu)
        bound = ROUNDED * max(distances(expected, attended("bfloat16", "xla", q, k, v, mask, cpu)).values()) + SLACK
        for backend in ("xla", "cudnn") if device.platform == "gpu" else ("xla",):
            errors = distances(expected, attended("bfloat16", backend, q, k, v, mask, device))
            told = ", ".join(f"{what} {error:.1e}" for what, error in errors.items())
            part.at_most(
                f"attention, {length} columns, window {window}, {backend}", max(errors.values()), bound, "", told
            )


def attended(dtype: str, backend: str, q, k, v, mask, device) -> dict[str, np.ndarray]:
    model = tiny(dtype, backend)

    def run(q, k, v, mask):
        context = attention.RowContext(None, None, jnp.zeros(mask.shape[:2], jnp.int32), None, (mask,))

        def total(*qkv):
            out = attention.attend_rows(model, *(x.astype(dtype) for x in qkv), jnp.int32(0), context)
            out = out.astype(jnp.float32)
            return jnp.sum(out * jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)), out

        return jax.grad(total, argnums=(0, 1, 2), has_aux=True)(q, k, v)

    with jax.default_matmul_precision("highest"):
        (of_q, of_k, of_v), out = jax.device_get(jax.jit(run)(*jax.device_put((q, k, v, np.asarray(mask)), device)))
    return {"values": out, "of q": of_q, "of k": of_k, "of v": of_v}


def tiny(dtype: str, backend: str) -> ModelConfig:
    heads, dim = LONG["heads"], LONG["head_dim"]
    return ModelConfig(
        "llama", 256, 1, heads * dim, heads, LONG["kv_heads"], dim, 128, 2048, dtype=dtype, attention=backend
    )


# First steps ----------------------------------------------------------------------------------------------------------


def first_dpo_step(part: Part, dtype: str, mesh) -> None:
    """Policy and reference are the same weights, the reference kept as stages keep it: the loss is ln 2."""
    work = programs.dpo_step(Case("XS", dtype, rows=4, prompt=24, response=16), mesh, reference_seed=0)
    work.once()
    loss = float(work.carry[1]["loss"])
    part.at_most(f"first DPO step, {name_of(dtype)}: |loss - ln 2|", abs(loss - math.log(2)), 1e-5)


def first_ppo_step(part: Part, dtype: str, mesh) -> None:
    """Log-probs are computed in whole rows, and in the update in rows as narrow as their replies: the ratio is 1."""
    case = Case("XS", dtype, rows=4, prompt=24, response=64, ending=True, microbatch=2)
    work = programs.ppo_update(case, mesh)
    work.once()
    found = work.carry[1]
    for name, asked in (("kl", 1e-5), ("kl_k3", 1e-5), ("ratio_deviation_first", 1e-3)):
        part.at_most(f"first PPO step, {name_of(dtype)}: |{name}|", abs(float(found[name])), asked)


def sampler(part: Part, dtype: str, mesh) -> None:
    """Log-probs as they were sampled, one token at a time, against one forward pass over the same replies."""
    model = dataclasses.replace(Case("XS", dtype).model(mesh), layers=2)
    weights = programs.random_weights(model, mesh, 0)
    weights = jax.tree.map(lambda leaf: 3 * leaf if leaf.ndim > 2 else leaf, weights)  # so that chances differ
    random = np.random.default_rng(0)
    prompts = padded([random.integers(3, 1000, size).astype(np.int32) for size in (24, 5, 13, 1)])
    settings = sampling.SamplingConfig(max_new_tokens=24, n=2, temperature=0.7)
    with jax.default_matmul_precision("highest"):
        drawn = candidates.sampler(model, settings, mesh)(weights, prompts, np.int32(0), np.int32(0))
        score = jax.jit(functools.partial(scoring.response_logps, model, temperature=0.7))
        again = score(weights, drawn.batch)
    apart = np.abs(np.asarray(again.logps).reshape(drawn.logps.shape) - np.asarray(drawn.logps))
    part.at_most(
        f"sampler against scorer, {name_of(dtype)}: largest difference of a log-prob",
        float(apart.max()),
        1e-4 if model.dtype == "float32" else 0.1,
        "nats",
        f"mean {apart.mean():.1e}, of {apart.size} tokens",
    )


def padded(pieces: list[np.ndarray]) -> Batch:
    """Prompts of several lengths, padded on the left."""
    ids = np.arange(len(pieces), dtype=np.int32)
    encoded = encode.assemble(pieces, 0, Conventions(1, 2, 2, False), "random", id=ids, prompt_id=ids)
    return Batch(**prompt_slots(encoded, ids, max(map(len, pieces))), window=0)


def name_of(dtype: str) -> str:
    return "float32" if dtype == "f32" else "the platform's own dtype"


def marked(part: Part) -> None:
    """The tests that need a card, in a process of their own, on what memory this one leaves."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/test_gpu.py"]
    beside = allocator.environment(0.05)  # what this process holds
    done = subprocess.run(command, capture_output=True, text=True, env=beside)
    last = (done.stdout.strip().splitlines() or [done.stderr[-300:]])[-1]
    part.true("tests under the gpu marker", done.returncode == 0, last, "pass")


if __name__ == "__main__":
    sys.exit(main())
