"""The benchmark runs and tells what it measured; no test asserts a time."""

import itertools
import json
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("torchvision")

from roialign import LevelMapper, MultiScaleRoIAlign, ops, roi_align
from roialign.__main__ import main
from roialign.bench import busy, contest, memory, models, peers, probes, shapes, timing, workloads
from roialign.bench.workloads import QUICK, ROIALIGN, TINY, WORKLOADS

SPREAD = {"min", "q1", "median", "q3", "max", "runs"}


@pytest.fixture(autouse=True)
def _in_tmp_path_and_quick(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timing, "_SAMPLE", 0)
    monkeypatch.setattr(timing, "_PAUSE", 0)


@pytest.fixture
def no_processes(monkeypatch):
    """Leave out what starts processes of its own, which takes seconds."""
    monkeypatch.setattr(probes, "extra_memory", lambda name, quick: 1.5)
    monkeypatch.setattr(probes, "first_call", lambda: FIRST_CALL)


CALLS = {"import_s": 0.01, "forward_s": 1.5, "backward_s": 2.5}
FIRST_CALL = {"import_s": 0.02, "cold": CALLS | {"numba_s": 0.02}, "cached": CALLS | {"numba_s": 0.02}}


def bench(*arguments):
    return main(["bench", "--quick", "--repeats", "2", *arguments])


def only(*names):
    return [word for name in names for word in ("--only", name)]


@pytest.mark.usefixtures("no_processes", "threads")
def test_everything_is_measured_printed_and_written(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert bench("--threads", "1", "--json", "out.json", "--plot", "out.png") == 0
    report = json.loads((tmp_path / "out.json").read_text())
    assert set(report) == {
        "machine", "versions", "settings", "skipped", "workloads", "floor", "first_call", "growth",
        "busy", "models", "memory", "shapes",
    }  # fmt: skip
    assert set(report["machine"]) == {"cpu", "vectors", "cores", "load", "system", "date"}
    assert report["versions"]["torch"] == torch.__version__
    assert report["settings"] == {
        "engine": ops.engine("cpu").__name__, "threads": 1, "quick": True, "seconds": 5.0, "repeats": 2,
    }  # fmt: skip
    assert report["skipped"] == {}
    assert [row["name"] for row in report["workloads"]] == list(WORKLOADS)
    for row in report["workloads"]:
        assert set(row["ms"]) == {"roialign", "torchvision"}
        assert all(set(values) == SPREAD and values["runs"] == 2 for values in row["ms"].values())
        assert row["ratio"]["q1"] <= row["ratio"]["median"] <= row["ratio"]["q3"]
        assert row["agrees"]
        assert row["extra_mb"] == (None if row["name"].startswith("one-box") else 1.5)
    assert [point["boxes"] for point in report["growth"]] == [1, 2, 6, 20, 60, 160]
    assert set(report["floor"]) == {
        "copy_gb_per_s", "output_mb", "write_reused_ms", "write_fresh_ms", "write_fresh_huge_pages_ms",
    }  # fmt: skip
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for words in (
        *WORKLOADS,
        "GB/s",
        "import roialign",
        "first backward, compiled",
        "2.50 s",
        "wrote out.png",
    ):
        assert words in printed


@pytest.mark.usefixtures("no_processes")
def test_sections_can_be_chosen(tmp_path, capsys):
    assert bench("--json", "out.json", *only("mask-head", "one-box")) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    assert [row["name"] for row in report["workloads"]] == ["mask-head", "one-box"]
    assert report["floor"] is report["first_call"] is report["growth"] is None
    assert "GB/s" not in capsys.readouterr().out


def test_scratch_by_number_of_boxes(tmp_path, capsys):
    assert bench("--json", "out.json", *only("memory")) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["memory"]
    kinds = [(row["channels"], row["direction"], row["grid"]) for row in rows]
    assert kinds == list(itertools.product((1,), ("forward", "backward"), ("fixed", "adaptive")))
    for row in rows:
        assert list(row["mb"]) == ["10", "1000"]
        assert all(mb is None or -1 < mb < 64 for mb in row["mb"].values())
    assert "1000 boxes" in capsys.readouterr().out


def test_scratch_of_large_results_is_not_measured(monkeypatch):
    monkeypatch.setattr(memory, "python", lambda *_: "1.5\n")
    rows = memory.scratch(False)
    assert [row["channels"] for row in rows] == [1] * 4 + [3] * 4 + [16] * 4
    assert list(rows[-1]["mb"].values()) == [1.5, 1.5, 1.5, None]


def test_beside_busy_threads(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(busy, "THREADS", (0, 1))
    monkeypatch.setattr(timing, "_IN_A_ROW", 1)
    before = threading.active_count()
    assert bench("--json", "out.json", *only("busy")) == 0
    assert threading.active_count() == before
    rows = json.loads((tmp_path / "out.json").read_text())["busy"]
    assert [row["busy"] for row in rows] == [0, 1]
    for row in rows:
        assert set(row["ms"]) == {"roialign", "torchvision"}
        assert all(0 < ms["median"] <= ms["p95"] for ms in row["ms"].values())
    assert "beside threads of pure Python" in capsys.readouterr().out


@pytest.fixture
def small_grid(monkeypatch):
    axes = {
        "channels": (1, 16), "bins": (1, 7), "boxes": (1, 10), "layout": ("NCHW", "channels_last"),
        "dtype": ("float32", "bfloat16"), "sampling": (2, "adaptive"), "timed": ("forward", "backward"),
        "maps": (1, 4), "threads": (1, 2),
    }  # fmt: skip
    monkeypatch.setattr(shapes, "AXES", axes)
    monkeypatch.setattr(shapes, "NAMED", shapes.NAMED[:1])
    return axes


@pytest.mark.usefixtures("threads")
def test_shapes_are_sampled_measured_printed_and_written(tmp_path, small_grid, capsys):
    pytest.importorskip("matplotlib")
    arguments = ["--minutes", "1", "--json", "out.json", "--plot", "out.png", *only("shapes")]
    assert bench(*arguments) == 0
    grid = json.loads((tmp_path / "out.json").read_text())["shapes"]
    assert (grid["cells_of_grid"], grid["cells_allowed"], grid["pairs_allowed"]) == (512, 512, 144)
    assert "more than 1 GB" in grid["rule"]
    named, sampled = ([row for row in grid["rows"] if row["named"] is is_named] for is_named in (True, False))
    assert [row["name"] for row in named] == ["photo to 224, 1 thread", "photo to 224, 2 threads"]
    assert sampled
    for row in grid["rows"]:
        assert row["agrees"]
        assert set(row["ms"]) == {"roialign", "torchvision"}
        assert set(small_grid) < set(row)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    worst = min(grid["rows"], key=lambda row: row["ratio"]["median"])["name"]
    for words in ("Left out: ", "photo to 224, 1 thread", "bwd 10", "The worst 10", worst):
        assert words in printed


@pytest.mark.usefixtures("small_grid", "threads")
def test_shapes_with_the_threads_asked_for(tmp_path):
    assert bench("--threads", "1", "--minutes", "0.02", "--json", "out.json", *only("shapes")) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["shapes"]["rows"]
    assert {row["threads"] for row in rows} == {1}


@pytest.mark.usefixtures("small_grid")
def test_shapes_need_torchvision(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.ops", None)
    assert bench("--json", "out.json", *only("shapes")) == 0
    assert json.loads((tmp_path / "out.json").read_text())["shapes"] is None


@pytest.mark.usefixtures("small_grid", "threads")
def test_shapes_that_differ_are_told_of(monkeypatch, capsys):
    wrong = ROIALIGN._replace(roi_align=lambda *arguments: roi_align(*arguments) * float("nan"))
    monkeypatch.setattr(contest, "ROIALIGN", wrong)
    assert bench("--minutes", "0.01", *only("shapes")) == 1
    assert "shapes, photo to 224, 1 thread: the results DIFFER" in capsys.readouterr().err


@pytest.mark.parametrize(("ratio", "looks"), [(0.9, 2), (1.0, 1), (19.0, 1), (21.0, 2)])
def test_ratios_that_are_hard_to_believe_are_measured_again(ratio, looks, monkeypatch):
    efforts = []

    def race(calls, effort):
        efforts.append(effort.seconds)
        return {"ms": {}, "ratio": {"median": ratio}}

    monkeypatch.setattr(shapes, "race", race)
    cell = shapes.Cell(shapes.NAMED[0], 1, TINY)
    row = shapes._measure(cell, timing.Effort(5.0), contest.find_libraries()[0])
    assert efforts == [0.5, 5.0][:looks]
    assert row["first_ratio"] == ratio


def test_samples_of_shapes_meet_all_pairs_and_grow():
    allowed = [cell for cell in shapes.product(shapes.AXES, False) if shapes.is_allowed(cell)]
    assert all(shapes.bytes_of(cell) <= 1e9 and shapes.seconds_of(cell) <= 1 for cell in allowed)
    three, four = (
        shapes.plan(allowed, shapes.AXES, 60 * minutes, timing.Effort(5.0), False) for minutes in (3, 4)
    )
    assert three == four[: len(three)] != four
    named = 2 * len(shapes.NAMED)
    assert [cell.workload for cell in three[:named:2]] == list(shapes.NAMED)
    met = shapes.pairs_of([cell.facts() for cell in three[named:]])
    counts = [len(values) for values in shapes.AXES.values()]
    assert len(met) == sum(a * b for a, b in itertools.combinations(counts, 2))
    assert all(map(shapes.is_allowed, three))


def test_estimates_of_adaptive_grids_follow_the_boxes():
    photo = next(work for work in shapes.NAMED if work.name == "photo to 224")
    seconds = [shapes.seconds_of(shapes.Cell(photo._replace(ratio=r), 1, photo.size)) for r in (1, 0)]
    assert seconds[1] == pytest.approx(9 * 5 * seconds[0])  # 1920 / 224 and 1080 / 224, rounded up


def test_whole_detectors_do_the_same_before_and_after(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "DETECTORS", {"a detector": "fasterrcnn_mobilenet_v3_large_fpn"})
    assert bench("--json", "out.json", *only("models")) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["models"]
    assert [(row["name"], row["what"]) for row in rows] == [
        ("a detector", "inference"),
        ("a detector", "training step"),
    ]
    assert all(row["agrees"] and set(row["ms"]) == {"roialign", "torchvision"} for row in rows)
    assert "training step" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["inference", "training step"])
def test_detectors_that_differ_are_told_of(what, monkeypatch, capsys):
    monkeypatch.setattr(models, "DETECTORS", {"a detector": "fasterrcnn_mobilenet_v3_large_fpn"})
    convert = models.convert_poolers

    def convert_wrongly(model):
        convert(model).roi_heads.box_roi_pool.aligned = True
        return model

    monkeypatch.setattr(models, "convert_poolers", convert_wrongly)
    assert bench(*only("models")) == 1
    assert f"a detector, {what}: the results DIFFER" in capsys.readouterr().err


@pytest.mark.usefixtures("no_processes")
def test_a_picture_of_nothing(tmp_path):
    pytest.importorskip("matplotlib")
    assert bench("--plot", "out.svg", *only("floor")) == 0
    assert (tmp_path / "out.svg").exists()


@pytest.mark.usefixtures("no_processes")
def test_without_torchvision(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchvision.ops", None)
    assert bench("--json", "out.json", "--plot", "out.png", *only("one-box", "growth")) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    assert set(report["workloads"][0]["ms"]) == {"roialign"}
    assert report["workloads"][0]["ratio"] is None
    assert "without torchvision: import of torchvision.ops halted" in capsys.readouterr().out


@pytest.mark.usefixtures("no_processes")
def test_peers_that_are_missing_are_skipped(tmp_path, monkeypatch, capsys):
    for name in ("onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, name, None)
    assert bench("--peers", "--json", "out.json", *only("box-head", "backward")) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    assert set(report["skipped"]) == {"onnxruntime", "openvino"}
    assert all(set(row["ms"]) == {"roialign", "torchvision"} for row in report["workloads"])
    assert "without openvino: import of openvino halted" in capsys.readouterr().out


@pytest.mark.usefixtures("no_processes")
@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_peers_do_the_same_work(name, tmp_path):
    pytest.importorskip(name)
    assert bench("--peers", "--json", "out.json", *only("box-head", "adaptive", "one-box", "backward")) == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "out.json").read_text())["workloads"]}
    assert name not in rows.pop("backward")["ms"]
    assert len(rows) == 3
    for row in rows.values():
        assert set(row["ms"][name]) == SPREAD
        assert row["differences"][name] < 1e-4


@pytest.mark.usefixtures("no_processes")
def test_different_results_are_an_error(monkeypatch, capsys):
    class Wrong(MultiScaleRoIAlign):
        def forward(self, *arguments):
            return super().forward(*arguments) + 1e-3

    monkeypatch.setattr(contest, "ROIALIGN", ROIALIGN._replace(pooler=Wrong))
    assert bench(*only("one-box")) == 1
    assert "one-box: the results DIFFER" in capsys.readouterr().err


@pytest.mark.usefixtures("no_processes")
def test_the_reference_is_not_timed_in_silence(capsys):
    with ops.use_reference():
        assert bench(*only("one-box")) == 1
    assert "these are the times of the slow reference" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", "0"], "--repeats must be positive, got 0"),
        (["--seconds", "-1"], "--seconds must be positive, got -1"),
        (["--minutes", "0"], "--minutes must be positive, got 0"),
        (["--threads", "0"], "--threads must be positive, got 0"),
        (["--json", "none/out.json"], "--json must be a file in a folder that exists, got 'none/out.json'"),
        (["--json", "."], "--json must be a file in a folder that exists, got '.'"),
        (["--plot", "out.nope"], "--plot must end in one of "),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    pytest.importorskip("matplotlib")
    assert main(["bench", *arguments]) == 2
    assert capsys.readouterr().err.startswith("python -m roialign bench: " + message)


def test_a_plot_needs_matplotlib(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    assert main(["bench", "--plot", "out.png"]) == 2
    assert capsys.readouterr().err.endswith('; pip install "roialign[demo]"\n')


def test_boxes_lie_in_the_image_and_every_level_gets_some():
    boxes = workloads.make_boxes(1000, (800, 1344))
    assert (boxes[:, :2] < boxes[:, 2:]).all()
    assert (boxes >= 0).all()
    assert (boxes <= torch.tensor([1344, 800, 1344, 800])).all()
    assert LevelMapper(2, 5)([boxes]).bincount().min() > 50
    assert torch.equal(boxes, workloads.make_boxes(1000, (800, 1344)))


@pytest.mark.parametrize("name", WORKLOADS)
def test_calls_return_what_is_timed(name):
    workload = WORKLOADS[name]
    size = TINY._replace(channels=3)
    maps = workloads.make_maps(workload, size)
    call = workloads.make_call(workload._replace(boxes=3), size, maps, ROIALIGN)
    pooled, grads = (3, 3, workload.bins, workload.bins), [tuple(f.shape) for f in maps.values()]
    expected = {"forward": [pooled], "backward": grads, "both": [pooled, *grads]}[workload.timed]
    for _ in range(2):
        assert [tuple(t.shape) for t in call()] == expected
    assert all(f.is_contiguous() != workload.channels_last for f in list(maps.values())[:3])


def test_functions_take_turns():
    order = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    times = timing.time_by_turns(calls, timing.Effort(9.0, 3))
    assert "".join(order) == "aabb" + "ab" * 3
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}


def test_effort_counts_rounds():
    assert list(timing.Effort(0.0).rounds()) == [0, 1, 2]
    assert list(timing.Effort(9.0, 2).rounds()) == [0, 1]


def test_spread_and_ratio():
    slow = timing.spread([4.0, 8.0, 6.0])
    assert slow == {"min": 4, "q1": 5, "median": 6, "q3": 7, "max": 8, "runs": 3}
    assert timing.spread([2.0]) == dict.fromkeys(SPREAD, 2.0) | {"runs": 1}
    assert timing.ratio(slow, timing.spread([1.0, 2.0, 3.0])) == {"q1": 2.0, "median": 3.0, "q3": 7 / 1.5}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_measured_in_a_process_of_its_own():
    extra = probes.extra_memory("box-head", True)
    assert extra is not None
    assert -1 < extra < 64


def test_memory_is_unknown_where_the_process_fails(monkeypatch):
    monkeypatch.setattr(probes, "_MEMORY", "raise SystemExit(1)")
    assert probes.extra_memory("box-head", True) is None
    monkeypatch.setattr(probes, "_MEMORY", "print(None)")
    assert probes.extra_memory("box-head", True) is None


def test_first_calls_use_the_cache_of_their_own(monkeypatch):
    folders = []

    def python(program, *arguments, **environment):
        if "NUMBA_CACHE_DIR" in environment:
            folders.append(environment["NUMBA_CACHE_DIR"])
        return json.dumps(CALLS) if program == probes._FIRST_CALL else "0.02\n"

    monkeypatch.setattr(probes, "python", python)
    assert probes.first_call() == FIRST_CALL
    assert len(folders) == 4
    assert len(set(folders)) == 1


def test_programs_of_the_first_call_run(tmp_path):
    assert set(json.loads(probes.python(probes._FIRST_CALL))) == set(CALLS)
    assert float(probes.python(probes._IMPORT)) > 0
    (tmp_path / "one_line.py").write_text(probes._ONE_LINE, encoding="utf-8")
    assert float(probes.python(probes._FIRST_CALL_OF_NUMBA, str(tmp_path))) > 0
    with pytest.raises(subprocess.CalledProcessError):
        probes.python("raise SystemExit(1)")


def test_the_machine_is_described_everywhere(monkeypatch):
    assert probes.machine()["cpu"]
    monkeypatch.setattr(probes, "Path", lambda path: SimpleNamespace(read_text=_no_such_file))
    assert probes.machine()["cpu"]


def _no_such_file(encoding):
    raise FileNotFoundError


def test_peers_of_another_version_are_skipped(monkeypatch):
    monkeypatch.setattr(peers, "_openvino", lambda *_: 1 / 0)
    maps = workloads.make_maps(WORKLOADS["box-head"], TINY)
    _, skipped = peers.find_peers(WORKLOADS["box-head"], maps, workloads.make_boxes(2, QUICK.image))
    assert skipped["openvino"] == "division by zero"
