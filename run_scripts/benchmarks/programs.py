"""A model's sizes and lengths enter; the package's own train steps and sampler leave, ready to be timed.

Nothing here computes: a `Work` calls what the stages call, on random weights and random tokens.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from mpo_jax import optim, sharding
from mpo_jax.data import encode
from mpo_jax.data.encode import Encoded
from mpo_jax.data.loader import Loader
from mpo_jax.data.tokenizer import Conventions
from mpo_jax.models import attention, decoder, lora
from mpo_jax.models.config import LoraConfig, ModelConfig, compute_dtype
from mpo_jax.models.presets import Preset
from mpo_jax.planning import arithmetic
from mpo_jax.run import Data, Lora, Model, Run
from mpo_jax.sampling import SamplingConfig
from mpo_jax.settings import parse
from mpo_jax.stages import candidates, dpo, gradients, kinds, reward
from mpo_jax.stages import job as jobs
from mpo_jax.stages.job import Job
from mpo_jax.stages.ppo import update
from mpo_jax.stages.programs import Extent, device_bytes
from mpo_jax.types import PyTree

SHAPES = {  # hidden, layers, heads, feed-forward; llama2.c's stories15M and stories110M, tied embeddings
    "S": (288, 6, 6, 768),
    "M": (768, 12, 12, 2048),
    "XS": (64, 1, 4, 128),  # for the tests that guard what doesn't depend on the machine
    "1B": (2048, 16, 32, 8192),  # LLaMA-3.2-1B's, for one GPU
}
KV_HEADS, VOCABULARIES = {"1B": 8}, {"1B": 128_256}  # where they aren't the heads and VOCABULARY
VOCABULARY = 32_000
MEAN_REPLY = 37  # tokens, HH's; lengths are nearly geometric
PAIRS, SAMPLER_ROWS, PPO_ROWS, PPO_EPOCHS = 16, 32, 16, 4
DTYPES = {"f32": "float32", "mixed": "mixed", "auto": "auto"}


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured. rows: pairs or prompts of a step, of which a train step computes `microbatch` at a time (0: all
    of them); samples: replies to a prompt (the sampler alone); rank: of LoRA adapters, 0 trains all weights; ending:
    replies end after MEAN_REPLY tokens in the mean."""

    shape: str = "S"
    dtype: str = "f32"
    prompt: int = 64
    response: int = 64
    rows: int = 0
    samples: int = 1
    layers: int = 0  # 0: those of the shape
    attention: str = "auto"
    remat: str = "none"
    rank: int = 0
    ending: bool = False
    microbatch: int = 0

    @property
    def vocabulary(self) -> int:
        return VOCABULARIES.get(self.shape, VOCABULARY)

    def stop_ids(self) -> tuple[int, ...]:
        """A random model says all tokens with nearly equal chances: with one of MEAN_REPLY a stop token, replies have
        HH's lengths."""
        if not self.ending:
            return ()
        among = np.arange(3, self.vocabulary)
        stops = np.random.default_rng(1).choice(among, self.vocabulary // MEAN_REPLY, replace=False)
        return tuple(stops.tolist())

    def model(self, mesh) -> ModelConfig:
        width, layers, heads, mlp = SHAPES[self.shape]
        device = mesh.devices.flat[0]
        model = ModelConfig(
            family="llama",
            vocab_size=self.vocabulary,
            layers=self.layers or layers,
            width=width,
            heads=heads,
            kv_heads=KV_HEADS.get(self.shape, heads),
            head_dim=width // heads,
            mlp_width=mlp,
            max_positions=max(512, self.prompt + self.response),
            norm_eps=1e-5,
            tied_embeddings=True,
            dtype=compute_dtype(DTYPES[self.dtype], jax.default_backend()),
            remat=self.remat,
            lora=LoraConfig(self.rank, 2.0 * self.rank, ("q", "k", "v", "o")) if self.rank else None,
        ).for_mesh(mesh)
        chosen = attention.choose(
            self.attention, model, device.platform, mesh.size, attention.compute_capability(device)
        )
        return dataclasses.replace(model, attention=chosen.backend)


@dataclasses.dataclass
class Work:
    """run: does one unit of work, from carry to carry, and leaves what it must be waited for. tokens: of one unit, by
    the peers' count (a pair has its prompt twice). programs: name -> (jitted function, its arguments). planned: bytes
    of one device by the plan's arithmetic, where it knows this work."""

    carry: Any
    run: Callable[[Any], Any]
    tokens: int
    programs: dict[str, tuple[Any, tuple]]
    planned: int | None = None

    def once(self) -> None:
        self.carry = jax.block_until_ready(self.run(self.carry))


def dpo_step(case: Case, mesh, reference_seed: int = 1) -> Work:
    """The reference's log-probs of a batch of pairs, then the train step on it: all that a pair costs in one epoch.

    reference_seed: 0 makes the reference the policy itself, as a training begins.
    """
    job = _job(case, mesh, "dpo", case.rows or PAIRS)
    model, rows = jobs.model(job), job.settings.batch_size
    batch = Loader(random_rows(case, rows, 2), rows, mesh=mesh, ref_logps=np.zeros((rows, 2), np.float32)).batch(0)
    beneath, policy = weights(model, mesh, 0)
    reference = beneath | random_weights(model, mesh, 0) if beneath else frozen(model, mesh, reference_seed)
    compiled = dpo.programs(job)
    score, step = compiled["reference"].function, compiled["train"].function
    state, base = _state(job, policy), {"base": beneath}

    def run(carry):
        state, _ = carry
        with_reference = dataclasses.replace(batch, ref_logps=score(reference, batch))
        return step(state, base, with_reference)

    programs = {"reference": (score, (reference, batch)), "step": (step, (state, base, batch))}
    planned = _planned(model, state, batch, [state, base, batch, reference], mesh, case.microbatch)
    return Work((state, None), run, 2 * rows * (case.prompt + case.response), _abstract(programs), planned)


def reward_step(case: Case, mesh) -> Work:
    """The train step of a reward model on a batch of pairs."""
    job = _job(case, mesh, "reward", case.rows or PAIRS)
    model, rows = jobs.model(job), job.settings.batch_size
    batch = Loader(random_rows(case, rows, 2), rows, mesh=mesh).batch(0)
    beneath, params = weights(model, mesh, 0, head=True)
    step = reward.programs(job)["train"].function
    state, base = _state(job, jobs.without_output(params)), {"base": beneath}

    def run(carry):
        return step(carry[0], base, batch)

    programs = {"step": (step, (state, base, batch))}
    planned = _planned(model, state, batch, [state, base, batch], mesh, case.microbatch)
    return Work((state, None), run, 2 * rows * (case.prompt + case.response), _abstract(programs), planned)


def sampler(case: Case, mesh) -> Work:
    """Replies to a batch of prompts, none of which stops early."""
    model, rows = case.model(mesh), case.rows or SAMPLER_ROWS
    settings = SamplingConfig(max_new_tokens=case.response, n=case.samples)
    prompts = Loader(random_rows(case, rows, 0), rows, form="slots", mesh=mesh).batch(0)
    policy = frozen(model, mesh, 0)
    draw = candidates.sampler(model, settings, mesh)

    def run(carry):
        round_ = np.int32(carry[0] + 1)
        return round_, draw(policy, prompts, np.int32(0), round_)

    programs = {"sample": (draw, (policy, prompts, np.int32(0), np.int32(0)))}
    return Work((np.int32(0), None), run, rows * case.samples * case.response, _abstract(programs))


def ppo_update(case: Case, mesh) -> Work:
    """One step of a ppo stage: rollout, scoring by policy, reference, critic and reward model, four epochs."""
    given = {"samples": case.samples, "inner_epochs": PPO_EPOCHS, "max_new_tokens": case.response}
    job = _job(case, mesh, "ppo", case.rows or PPO_ROWS, ("reference", "reward"), **given)
    model, settings = jobs.model(job), job.settings
    rows = settings.batch_size
    prompts = Loader(random_rows(case, rows, 0), rows, form="slots", mesh=mesh).batch(0)
    beneath, policy = weights(model, mesh, 0)
    params = {"policy": policy, "value": jobs.without_output(weights(model, mesh, 1, head=True)[1])}
    others = {
        "base": beneath,
        "reference": weights(model, mesh, 0)[1] if beneath else frozen(model, mesh, 0),
        "reward": weights(model, mesh, 2, head=True)[1] if beneath else frozen(model, mesh, 2, head=True),
    }
    optimizer, _ = update.make_optimizer(settings, settings.steps)
    state = gradients.init_state(optimizer, params, jax.random.key(0), mesh, update.first_extra(settings))
    compiled = kinds.KINDS["ppo"].programs(job, settings.steps)
    step = update.make_step(job, compiled, update.scored_on_device(compiled))
    tokens = rows * settings.samples * (case.prompt + case.response) * PPO_EPOCHS
    return Work((state, None), lambda carry: step(carry[0], others, prompts), tokens, {})


STEPS = {"dpo": dpo_step, "reward": reward_step, "sample": sampler, "ppo": ppo_update}


def random_rows(case: Case, rows: int, replies: int) -> Encoded:
    """Rows of exactly the case's lengths, of random tokens."""
    random = np.random.default_rng(0)
    lens = [case.prompt] + [case.response] * replies
    pieces = [random.integers(3, VOCABULARY, length).astype(np.int32) for _ in range(rows) for length in lens]
    ids = np.arange(rows, dtype=np.int32)
    return encode.assemble(pieces, replies, Conventions(1, 2, 2, False), "random", id=ids, prompt_id=ids)


def weights(model: ModelConfig, mesh, seed: int, head: bool = False) -> tuple[PyTree, PyTree]:
    """What lies frozen beneath a training, {} without adapters, and what it trains."""
    if model.lora is None:
        return {}, random_weights(model, mesh, seed, head)
    base = frozen(dataclasses.replace(model, lora=None), mesh, 0)
    adapters = random_weights(model, mesh, seed)
    return base, adapters | (decoder.init_head(model, jax.random.key(seed)) if head else {})


def frozen(model: ModelConfig, mesh, seed: int, head: bool = False) -> PyTree:
    """Random weights in the dtype that a stage keeps frozen ones in: bfloat16 where that is what it computes in."""
    return random_weights(model, mesh, seed, head, jnp.bfloat16 if model.dtype == "bfloat16" else jnp.float32)


def random_weights(model: ModelConfig, mesh, seed: int, head: bool = False, dtype=jnp.float32) -> PyTree:
    """A trunk, or adapters where the model has some, made on the device."""
    if model.lora is not None:
        return lora.init(model, jax.random.key(seed), mesh)

    def make():
        drawn = decoder.init(model, jax.random.key(seed), head=head)
        return jax.tree.map(lambda leaf: leaf.astype(dtype), drawn)

    return jax.jit(make, out_shardings=sharding.tree_shardings(jax.eval_shape(make), mesh))()


def _job(case: Case, mesh, kind: str, rows: int, inputs: tuple[str, ...] = (), **given) -> Job:
    """A stage of `rows` rows on a base model that is known by its numbers alone. inputs: roles that are filled."""
    given |= {"kind": kind, "batch_size": rows, "microbatch": case.microbatch, "steps": 1000}
    settings = parse(kinds.KINDS[kind].settings, given)
    adapters = Lora(rank=case.rank, alpha=2.0 * case.rank) if case.rank else Lora()
    model = Model(path="random", dtype=DTYPES[case.dtype], remat=case.remat, attention=case.attention, lora=adapters)
    data = Data(path="random", max_response=case.response, max_length=case.prompt + 2 * case.response)
    nowhere = epath.Path(".")
    preset = Preset(case.model(mesh), case.stop_ids())
    run = Run(model=model, data=data, stages={kind: settings})
    return Job(kind, settings, run, nowhere, nowhere, dict.fromkeys(inputs), mesh, preset)  # the caller makes weights


def _state(job: Job, params: PyTree):
    """A training's first state."""
    optimizer, _ = optim.of_settings(job.settings, job.settings.steps)
    return gradients.init_state(optimizer, params, jax.random.key(0), job.mesh)


def _planned(model: ModelConfig, state, batch, held, mesh, microbatch: int) -> int:
    """Bytes of a train step by the plan's arithmetic: what lies in memory, each array once, and the temporaries."""
    rows, length = batch.tokens.shape
    part = microbatch or rows
    trained = device_bytes(state.params)
    extent = Extent(model, "train", part, length, batch.window, trained=trained, repeats=rows // part)
    arrays = {id(leaf): leaf for leaf in jax.tree.leaves(held)}
    return device_bytes(list(arrays.values())) + arithmetic.temporaries(extent, mesh)


def _abstract(programs):
    """Arguments as shapes: the real ones are donated by the first step."""

    def shape(leaf):
        if not isinstance(leaf, jax.Array):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

    return {name: (function, jax.tree.map(shape, arguments)) for name, (function, arguments) in programs.items()}
