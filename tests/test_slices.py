"""Several TPU slices: `data` lies between them and all else within one; what can't be is told in a line."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from mpo_jax import sharding
from mpo_jax.errors import InputError
from mpo_jax.planning import chips, estimate, hlo, stages
from mpo_jax.planning.compile import Report
from tests.planning import case
from tests.tpu import compile_for_tpu

LAYERS, WIDTH, MLP, VOCABULARY, FSDP, TENSOR = 2, 512, 1536, 4096, 2, 2
STEP = f"""
import dataclasses
from mpo_jax.planning import chips, compile as compiler, stages
from mpo_jax.stages import kinds
from tests.planning import case

place = chips.topology("2xv5e:2x2")
config = case.config(16, 128, 128, "full", data=2, fsdp={FSDP}, tensor={TENSOR})
preset = case.model(layers={LAYERS}, width={WIDTH}, heads=4, mlp={MLP}, vocabulary={VOCABULARY})
job = dataclasses.replace(stages.jobs(config, place, ["dpo"])["dpo"], preset=preset)
with jax.set_mesh(job.mesh):
    program = kinds.of(job.settings).programs(job)["train"]
    found = compiler.report(program, place, job.mesh, keep_text=True)
report.update(text=found.text, sent=found.collectives, fits=found.fits, slices=place.slices, loops=program.extent.loops)
"""
MESHES = """
WANTED = (("2xv5e:4x4", (2, 4, 4)), ("2xv5e:4x4", (4, 8, 1)), ("3xv5e:2x2", (-1, 2, 2)), ("2xv4:2x2x2", (2, 8, 1)),
          ("v6e:4x4", (1, 8, 2)))
from mpo_jax.errors import InputError
from mpo_jax.planning import chips

for name, sizes in WANTED:
    place = chips.topology(name)
    made = sharding.make_mesh(*sizes, devices=place.devices)
    report[f"{name} {sizes}"] = {
        "slices": [sorted({getattr(device, "slice_index", 0) for device in block.flat}) for block in made.devices],
        "shape": dict(made.shape), "devices": len(set(made.devices.flat)), "size": place.size,
        "larger": chips.larger(place),
    }
told = []
for name, sizes in (("2xv5e:4x4", (1, -1, 1)), ("2xv5e:4x4", (3, 4, 4)), ("3xv5e:2x2", (2, 3, 2))):
    try:
        sharding.make_mesh(*sizes, devices=chips.topology(name).devices)
    except InputError as error:
        told.append(str(error))
report["told"] = told
"""


@dataclasses.dataclass(frozen=True)
class Device:
    """As much of a device as a mesh is laid out by."""

    id: int
    slice_index: int
    platform: str = "tpu"
    device_kind: str = "fake"
    process_index: int = 0
    core_on_chip: int = 0

    @property
    def coords(self) -> tuple[int, int, int]:
        """In its slice, which is 2 x 4 chips."""
        place = self.id // 2
        return (place % 2, place // 2, 0)


def test_data_goes_from_slice_to_slice_whatever_the_order_of_the_devices():
    devices = [Device(index, index % 2) for index in range(16)]
    assert sharding.slices(devices) == 2
    made = sharding.over_slices((4, 2, 2), devices)
    assert made.shape == (4, 2, 2) and len({device.id for device in made.flat}) == 16
    assert [{device.slice_index for device in block.flat} for block in made] == [{0}, {0}, {1}, {1}]


@pytest.mark.parametrize(
    ("sizes", "counts", "words"),
    [
        ((1, 8, 1), (4, 4), r"mesh.data: 1 on 2 slices; expected a multiple of 2, or -1: fsdp and tensor stay within"),
        ((3, 2, 2), (6, 6), r"mesh.data: 3 on 2 slices; expected a multiple of 2"),
        ((2, 3, 2), (8, 4), r"mesh: slices of \[4, 8\] devices; expected slices of one size"),
    ],
)
def test_what_slices_do_not_divide_is_told(sizes, counts, words):
    devices = [Device(slice_ * 100 + index, slice_) for slice_, count in enumerate(counts) for index in range(count)]
    with pytest.raises(InputError, match=words):
        sharding.over_slices(sizes, devices)


def test_hosts_of_gpus_and_cpus_are_no_slices():
    """A GPU's slice_index is its host's: fsdp may go over those."""
    assert sharding.slices([Device(0, 0, "gpu"), Device(1, 1, "gpu")]) == 1
    assert sharding.slices(jax.devices()) == 1


def test_meshes_that_are_proposed_leave_fsdp_and_tensor_within_a_slice():
    model = case.model(width=512, heads=4, mlp=1536).architecture
    found = stages.meshes(model, 16, slices=2)
    assert found == [{"data": 2, "fsdp": 8 // tensor, "tensor": tensor} for tensor in (1, 2, 4)]
    assert stages.meshes(model, 16, rows=8, slices=2) == found[1:]  # 8 rows over 2 x 8 is not whole


@pytest.mark.parametrize("name", ["0xv5e:2x2", "x2v5e:2x2", "2xgpu:80GB", "2xv9:2x2"])
def test_a_topology_of_slices_that_does_not_exist_is_told(name):
    with pytest.raises(InputError, match=r"unknown .*several slices as 2xv5e:4x8"):
        chips.topology(name)


def test_what_goes_between_slices_takes_the_network():
    """By hand: an all-reduce of 8 MB sends 16 MB; at half of 4 GB/s, 8 ms; 100 MB over links of 100 GB/s, 2 ms."""
    chip = chips.Chip("chip", 0, 1e12, 1e12, 100e9, 4e9)
    sent = {"all-gather": 100_000_000, "all-reduce" + hlo.BETWEEN_SLICES: 8_000_000}
    report = Report(0, 0, 0, 0, True, 0.0, 0.0, 0.0, sent, "", "compiler")
    found = estimate.seconds(report, chip, estimate.Assumptions(utilisation=0.5))
    assert found.collectives == pytest.approx(0.008)
    within = dataclasses.replace(report, collectives={"all-gather": 100_000_000})
    assert estimate.seconds(within, chip, estimate.Assumptions(utilisation=0.5)).collectives == pytest.approx(0.002)


def test_meshes_over_the_compilers_own_slices():
    found = compile_for_tpu(MESHES)
    assert found["2xv5e:4x4 (2, 4, 4)"]["slices"] == [[0], [1]]
    assert found["2xv5e:4x4 (4, 8, 1)"]["slices"] == [[0], [0], [1], [1]]
    three = found["3xv5e:2x2 (-1, 2, 2)"]
    assert three["slices"] == [[0], [1], [2]] and three["shape"] == {"data": 3, "fsdp": 2, "tensor": 2}
    assert three["larger"][0] == "3xv5e:2x4"
    assert found["2xv4:2x2x2 (2, 8, 1)"]["size"] == 16, "a v4 chip is one device"
    split = found["v6e:4x4 (1, 8, 2)"]
    assert split["shape"] == {"data": 1, "fsdp": 8, "tensor": 2}, "no axis of it is whole rings of 4 x 4 chips"
    assert all(each["devices"] == each["size"] for name, each in found.items() if name != "told")
    told = found["told"]
    assert "mesh.data: 1 on 2 slices; expected a multiple of 2" in told[0]
    assert "needs 48 devices; found 32" in told[1] and "mesh.data: 2 on 3 slices" in told[2]


@pytest.mark.slow
def test_only_gradients_go_between_slices():
    """A DPO step for two slices: groups within a slice name its four chips; between them are all-reduces of the
    gradients' shards, counted by hand, and of a few scalars."""
    found = compile_for_tpu(STEP)
    assert found["fits"] and found["slices"] == 2
    module = hlo.parse(found["text"], tuple(found["loops"]))
    kinds = {each.kind for each in module.collectives()}
    between = {kind for kind in kinds if kind.endswith(hlo.BETWEEN_SLICES)}
    assert between == {"all-reduce" + hlo.BETWEEN_SLICES}
    groups = _groups(found["text"])
    assert groups and all(set(group) <= {0, 1, 2, 3} for group in groups)
    assert '_xla_megascale_target="{1,2}x{0:3}"' in found["text"], "both slices, all chips of each"
    shards = FSDP * TENSOR
    layer = (4 * WIDTH * WIDTH + 3 * WIDTH * MLP) // shards * 2  # in bfloat16, as they come out of the backward pass
    embeddings = 2 * VOCABULARY * WIDTH // shards * 4
    sent = found["sent"]["all-reduce" + hlo.BETWEEN_SLICES]
    assert sent == pytest.approx(LAYERS * layer + embeddings, rel=0.02)


def _groups(text: str) -> set[tuple[int, ...]]:
    found = re.findall(r"replica_groups=\{((?:\{[\d,]+\},?)+)\}", text)
    assert len(found) == len(re.findall(r"replica_groups=", text)), "every group is listed"
    return {tuple(map(int, group.split(","))) for each in found for group in re.findall(r"\{([\d,]+)\}", each)}


def test_numbers_stay_those_of_one_slice_on_the_mesh_of_one():
    """One slice is laid out as ever."""
    ours = sharding.make_mesh(2, 2, 2, devices=jax.devices()[:8])
    np.testing.assert_array_equal(ours.device_ids, jax.make_mesh((2, 2, 2), sharding.MESH_AXES).device_ids)
