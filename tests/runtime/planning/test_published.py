"""The partitioner against cuts that others have published with all of their inputs.

PipeDream (Narayanan et al., SOSP 2019) prints configurations, its authors' repository (msr-fiddle/pipedream, commit
11c40c0) the inputs: `profiler/image_classification/profiles/vgg16/graph.txt` holds the forward and backward time of
each layer of VGG-16, `runtime/image_classification/models/vgg16/gpus=2` and `gpus=4_straight` the stages that their
optimizer made of it for equal GPUs, communication left out. (Its replicated plans weigh the exchange of gradients,
which inference does not have.)
"""

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
