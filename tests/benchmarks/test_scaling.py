"""The scaling model says what is counted in 1, 2 and 4 processes, and its page is up to date."""

from __future__ import annotations

import doctest
import importlib
import itertools
import json
import math
from pathlib import Path

import pytest
import torch

import stablekit
from benchmarks.scaling import __main__ as command
from benchmarks.scaling.check import TOLERANCE, Checked, check
from benchmarks.scaling.cost import Reduction
from benchmarks.scaling.counting import Counter
from benchmarks.scaling.deployments import LLAMA_7B, LLAMA_70B, LLAMA_405B, QWEN_235B
from benchmarks.scaling.evaluation import TORCH, evaluate
from benchmarks.scaling.machine import H100, latency, spread, step_time
from benchmarks.scaling.members import MEMBERS
from benchmarks.scaling.model import step_cost
from benchmarks.scaling.page import ANSWERS, text
from benchmarks.scaling.sizes import Held, Mesh, held

ROOT = Path(__file__).parents[2]
PAGE, COLLECTIVES = ROOT / "docs" / "scaling.md", ROOT / "docs" / "collectives.md"
MODULES = sorted(path.stem for path in (ROOT / "benchmarks" / "scaling").glob("[a-z]*.py"))
EXACT = {"collectives", "payload", "reads", "requests"}


@pytest.fixture(scope="module")
def rows() -> list[Checked]:
    return check()


@pytest.mark.distributed
@pytest.mark.parametrize("term", TOLERANCE)
def test_the_model_says_what_is_counted(rows: list[Checked], term: str) -> None:
    of_term = [row for row in rows if row.term == term]
    assert any(row.counted > 0 for row in of_term)
    assert [row for row in of_term if not row.holds] == []


@pytest.mark.distributed
def test_collectives_payload_and_host_reads_are_exact(rows: list[Checked]) -> None:
    exact = [row for row in rows if row.term in EXACT]
    assert [row for row in exact if row.model != row.counted] == []
    for where in ("2 processes, shard 2", "4 processes, pipeline 2 x shard 2"):
        assert {row.term for row in exact if row.where == where and row.counted} == EXACT - {
            "requests"
        }


@pytest.mark.distributed
def test_counts_are_from_one_two_and_four_processes_and_from_ten_thousand_ranks(
    rows: list[Checked],
) -> None:
    places = {row.where.partition(",")[0] for row in rows}
    assert places == {"1 process", "2 processes", "4 processes", "simulated"}
    assert any("pipeline 16 x replicate 2 x shard 40 x tensor 8" in row.where for row in rows)


@pytest.mark.parametrize(
    ("term", "model", "counted", "holds"),
    [
        ("collectives", 1, 2, False),
        ("payload", 100, 101, False),
        ("reads", 0.5, 0.5, True),
        ("bytes", 104_000, 100_000, False),
        ("bytes", 102_000, 100_000, True),
        ("kernels", 80, 100, False),
    ],
)
def test_a_model_that_is_off_is_told(term: str, model: float, counted: float, holds: bool) -> None:
    assert Checked("", "", term, model, counted).holds is holds


def test_a_fused_kernel_stores_the_gradients_that_the_model_has_it_store() -> None:
    param = torch.nn.Parameter(torch.zeros(1000))
    param.grad = torch.ones(1000)
    optimizer = torch.optim.AdamW([param], fused=True)
    stablekit.attach(optimizer, "global-norm:max_norm=1.0", device_mode=True)
    bare = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1000))], fused=True)
    bare.param_groups[0]["params"][0].grad = torch.ones(1000)
    optimizer.step()
    param.grad.fill_(1.0)
    with Counter() as attached:
        optimizer.step()
    bare.step()
    with Counter() as alone:
        bare.step()
    torch.testing.assert_close(param.grad, torch.full((1000,), 1000**-0.5))
    outside = attached.counts.minus(alone.counts).bytes
    assert outside == pytest.approx(4 * 1000, rel=0.1)  # one read and no write
    cost = step_cost(["global-norm"], Held(1000, 1, 1, 0, 0, 1000), Mesh())
    assert (cost.passes, cost.stored) == (2, 1)


def test_the_model_agrees_with_the_collectives_counted_under_fully_shard_and_ddp() -> None:
    lines = COLLECTIVES.read_text(encoding="utf-8").splitlines()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    heads, seen = table[0], 0
    here = held([(8, 8)] * 2, Mesh(shard=2))
    for row in table[2:]:
        chain = row[0].split(", ")
        if set(chain) <= set(MEMBERS):
            seen += 1
            for head, mesh in (("FSDP2", Mesh(shard=2)), ("DDP, loss observed", Mesh(replicate=2))):
                reductions = step_cost(chain, here, mesh).reductions
                assert len(reductions) == int(row[heads.index(head)]), (row[0], head)
    assert seen >= 10


@pytest.mark.parametrize(
    "mesh", [Mesh(), Mesh(shard=4), Mesh(tensor=2), Mesh(replicate=3, shard=4, tensor=2)]
)
def test_what_a_rank_holds_is_what_torch_cuts(mesh: Mesh) -> None:
    shapes = [(10, 6), (10,), (7, 5, 3)]
    parts = [torch.empty(shape).chunk(mesh.shard)[0] for shape in shapes]
    parts = [part.chunk(mesh.tensor, 1)[0] if part.ndim > 1 else part for part in parts]
    here = held(shapes, mesh)
    assert here.elements == sum(part.numel() for part in parts)
    assert here.rows == sum(len(part) for part in parts if part.ndim > 1)
    assert here.largest == max(part.numel() for part in parts)
    assert (here.tensors, here.vectors, here.units) == (3, 1, 17)


def test_groups_are_spread_over_machines_as_ranks_in_order_are() -> None:
    mesh = Mesh(pipeline=2, replicate=2, shard=8, tensor=4)
    ranks = list(itertools.product(*map(range, mesh.dims.values())))
    for size in range(1, 5):
        for over in itertools.combinations(mesh.dims, size):
            members = [
                number
                for number, place in enumerate(ranks)
                if all(at == 0 for way, at in zip(mesh.dims, place, strict=True) if way not in over)
            ]
            machines = {number // 8 for number in members}
            first = sum(number < 8 for number in members)
            assert spread(over, mesh, 8) == (first, len(machines)), over


def test_models_have_the_published_numbers_of_parameters() -> None:
    published = {LLAMA_7B: 6_738_415_616, LLAMA_70B: 70_553_706_496, LLAMA_405B: 405_853_388_800}
    for model, count in {**published, QWEN_235B: 235_093_634_560}.items():
        assert sum(map(math.prod, model.shapes())) == count


def test_a_step_takes_as_long_as_its_arithmetic() -> None:
    assert step_time(1e9, 1e6, 4) == pytest.approx(6e15 / 4 / 989e12 / 0.4)


def test_the_all_reduce_does_not_grow_with_ranks_but_its_latency_does() -> None:
    here = held([(64, 64)] * 10, Mesh(shard=8))
    payloads = {step_cost(["zclip"], here, Mesh(shard=n)).payload for n in (2, 8, 1024)}
    assert payloads == {4 * (2 * 10 + 4)}
    latencies = [latency(Reduction(("shard",), 0), Mesh(shard=n)) for n in (2, 8, 16, 1024)]
    assert latencies == sorted(set(latencies))


def test_a_chain_of_norm_plugins_reads_once_and_reduces_once() -> None:
    here = held([(64, 64)] * 10, Mesh(shard=8))
    one = step_cost(["zclip"], here, Mesh(shard=8))
    many = step_cost(["nonfinite-guard", "global-norm", "zclip", "autoclip"], here, Mesh(shard=8))
    assert many.passes == one.passes
    assert many.reductions == one.reductions


def test_every_first_bottleneck_has_an_answer() -> None:
    firsts = {one.times.first for one in evaluate() if one.chain != TORCH}
    assert firsts <= set(ANSWERS)
    assert len(firsts) > 1
    assert all(
        one.times.total == pytest.approx(sum(vars(one.times).values())) for one in evaluate()
    )
    assert H100.node == 8


def test_the_page_is_up_to_date(tmp_path: Path) -> None:
    generated = text(evaluate(), markdown=True)
    assert generated in PAGE.read_text(encoding="utf-8"), (
        "run: python -m benchmarks.scaling --markdown docs/scaling.md"
    )
    copy = tmp_path / "page.md"
    copy.write_text(PAGE.read_text(encoding="utf-8").replace("3.35 TB/s", "9"), encoding="utf-8")
    command.main(["--markdown", str(copy)])
    assert copy.read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8")


def test_the_page_says_that_nothing_was_run_on_a_gpu() -> None:
    assert "nothing was run on a GPU" in PAGE.read_text(encoding="utf-8")


def test_json_holds_every_run_and_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert len(said) == len(evaluate())
    assert {entry["ranks"] for entry in said} >= {1, 8, 512, 10_240}
    assert all(0 < entry["share"] < 1 for entry in said)


@pytest.mark.parametrize("module", MODULES)
def test_examples_of_the_model_run(module: str) -> None:
    found = importlib.import_module(f"benchmarks.scaling.{module}")
    assert doctest.testmod(found, optionflags=doctest.ELLIPSIS).failed == 0
