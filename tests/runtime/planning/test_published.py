"""The partitioner against cuts that others have published with all of their inputs.

PipeDream (Narayanan et al., SOSP 2019) prints configurations, its authors' repository (msr-fiddle/pipedream, commit
11c40c0) the inputs: `profiler/image_classification/profiles/vgg16/graph.txt` holds the forward and backward time of
each layer of VGG-16, `runtime/image_classification/models/vgg16/gpus=2` and `gpus=4_straight` the stages that their
optimizer made of it for equal GPUs, communication left out. (Its replicated plans weigh the exchange of gradients,
which inference does not have.)

vllm-project/vllm#34076: Qwen3-Coder-30B-A3B in FP8 on cards of 16,303 and 32,607 MiB, of which it may use 90 %, cut by
hand into 16 and 32 of its 48 blocks. A cache of 262,144 tokens is 24.0 GiB; 3.18 GiB are left on the smaller card. vLLM
divides these by what all 48 blocks need, and allows 34,736 tokens.
"""

import bisect
import itertools

import pytest
from stageline.runtime.planning.partition import best_plan
from stageline.runtime.planning.problem import DeviceCost, Link, Plan, PlannedStage, Problem

VGG16_MS = (  # forward, backward; node2 to node41
    (22.307, 24.613), (4.446, 5.553), (46.201, 113.330), (4.455, 5.311), (3.795, 5.579), (15.155, 39.648),
    (2.359, 2.738), (22.062, 53.379), (2.513, 2.620), (2.211, 2.788), (10.814, 18.335), (1.377, 1.380),
    (17.458, 27.023), (1.640, 1.463), (14.245, 33.888), (1.549, 1.321), (1.169, 1.513), (9.249, 14.574),
    (1.026, 0.696), (15.359, 21.900), (0.848, 0.679), (11.775, 28.670), (0.881, 0.642), (0.802, 0.781),
    (5.608, 7.381), (0.784, 0.266), (4.070, 7.396), (0.463, 0.190), (4.042, 8.648), (0.455, 0.175),
    (0.553, 0.234), (0.0, 0.0), (0.0, 0.0), (2.475, 4.575), (0.377, 0.030), (0.0, 0.0),
    (0.709, 0.734), (0.277, 0.032), (0.0, 0.0), (0.393, 0.548),
)  # fmt: skip
FIRST_NODE = 2


@pytest.mark.parametrize("begins", [(2, 10), (2, 5, 14, 25)])  # the first node of each stage of theirs
def test_vgg16_is_cut_as_pipedream_cuts_it(begins: tuple[int, ...]) -> None:
    times = tuple((forward + backward) / 1e3 for forward, backward in VGG16_MS)
    blocks, stages = len(times), len(begins)
    problem = Problem(
        devices=(DeviceCost("V100", (0.0, *times, 0.0), 1.0),),
        links=((Link(),),),
        use_bytes=(0.0,) * (blocks + 2),
        cut_bytes=(0.0,) * blocks,
        counts=(stages,),
        stages=stages,
    )
    found = best_plan(problem)
    assert found is not None
    bounds = [node - FIRST_NODE for node in (*begins, FIRST_NODE + blocks)]
    theirs = Plan.of(problem, [PlannedStage(0, first, end) for first, end in itertools.pairwise(bounds)])
    assert found.bottleneck_s == pytest.approx(theirs.bottleneck_s, rel=1e-12)
    if stages == 2:  # no other cut is as good; with four stages several are
        assert found.stages == theirs.stages


MIB = 2**20
TOKEN_BYTES = 24 * 2**30 / 262_144 / 48  # of a block
TABLE_BYTES = 151_936 * 2048 * 2  # the words, and as much again for the head
BLOCK_BYTES = (0.9 * 16_303 * MIB - 3.18 * 2**30 - TABLE_BYTES) / 16  # of what the smaller card had left


def test_unlike_cards_hold_what_each_has_room_for() -> None:
    def plan(capacity: int) -> Plan | None:
        block = BLOCK_BYTES + capacity * TOKEN_BYTES
        memory = [0.9 * mib * MIB for mib in (16_303, 32_607)]
        return best_plan(
            Problem(
                devices=tuple(DeviceCost(f"{size:.0f}", (0.0, *[1e-3] * 48, 0.0), size) for size in memory),
                links=((Link(), Link()), (Link(), Link())),
                use_bytes=(TABLE_BYTES, *[block] * 48, TABLE_BYTES),
                cut_bytes=(0.0,) * 48,
            )
        )

    most = bisect.bisect_left(range(262_145), True, key=lambda capacity: plan(capacity) is None) - 1
    found = plan(most)
    assert found is not None
    assert [stage.end - stage.first for stage in found.stages] == [16, 32]
    assert most == pytest.approx(3 * 34_736, rel=0.001)
