"""The benchmarks measure what they say; a peer that is not there is skipped with its reason; ratios and exponents are right. No test times anything."""

import importlib
import importlib.util
import inspect
import json
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks import bare, cases, catalogue, cpu, data, data_cases, evaluation, gpu, grid, kernels, measure, peers, slurm_node
from homelib.data.cache import CaseFile

ROOT = Path(__file__).resolve().parent.parent
TINY = {"batch": 1, "channels": 3, "tokens": 300, "state": 2}


def test_a_case_in_a_process_of_its_own_tells_time_memory_and_error():
    told = measure.in_process({"kind": "scan", "peer": "homelib blocked", "backward": True, "runs": 3, **TINY}, threads=1)
    assert told["runs"] == 3
    assert 0 < told["fastest"] <= told["seconds"] <= told["slowest"]
    assert told["peak_mib"] >= 0
    assert told["detail"]["error"] < 1e-5


def test_a_case_that_fails_is_skipped_with_its_reason():
    told = measure.in_process({"kind": "scan", "peer": "homelib mamba_ssm", "backward": True, **TINY}, threads=1)
    assert "mamba_ssm" in told["skipped"]


def test_memory_is_the_most_that_was_there_at_a_time():
    def run():
        a = torch.ones(2**23)
        b = torch.ones(2**23)
        del a, b
        torch.ones(2**20)

    assert 60 < measure.measure(run, runs=2).peak_mib < 90  # two of 32 MiB, whatever came after


def test_the_largest_of_the_workers_is_told_and_not_the_process_that_waits():
    hold = "import time; held = bytearray(b'1') * (%d << 20); time.sleep(1)"
    with measure.workers_peak(0.05) as peak:
        running = [subprocess.Popen([sys.executable, "-c", hold % mib]) for mib in (8, 96)]
        assert [one.wait() for one in running] == [0, 0]
    assert 96 < peak["worker_mib"] < 150


def test_several_things_are_timed_in_turn_and_their_memory_is_their_own():
    order = []

    def large():
        order.append("b")
        time.sleep(0.02)
        torch.ones(2**23)

    told = measure.measure_in_turn({"a": lambda: order.append("a"), "b": large}, runs=3)
    assert order == ["a", "b"] * 5
    assert told["a"].seconds < 0.02 <= told["b"].seconds
    assert told["a"].peak_mib < 16 < 28 < told["b"].peak_mib


@pytest.mark.parametrize("peer", peers.SCANS)
def test_every_peer_that_is_there_computes_the_scan(peer):
    backend = peer.removeprefix("homelib ")
    if backend in ("triton", "mamba_ssm"):
        pytest.skip(f"{peer}: a backend for GPUs, tested with the others in tests/network")
    try:
        scan = peers.SCANS[peer]()
    except ImportError as error:
        assert backend == peer, "homelib's own backends are there"
        pytest.skip(f"{peer}: {error}")
    given = cases.scan_inputs(device="cpu", backward=False, **TINY)
    torch.testing.assert_close(scan(*given), peers.homelib("reference")(*given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "case",
    [
        {"kind": "conv", "channels": 3, "tokens": 40, "backward": True, "in_turn": cpu.CONV_WAYS},
        {"kind": "conv", "channels": 3, "tokens": 40, "backward": False, "in_turn": cpu.CONV_WAYS},
        pytest.param({"kind": "home", "stage": 4, "tokens": 300, "backward": True, "in_turn": cpu.HOME_WAYS}, marks=pytest.mark.long, id="home"),
        {"kind": "network", "which": "MambaHoME", "width": 4, "size": 32, "channels_last": True, "parts": True},
        {"kind": "network", "which": "MambaHoME", "width": 4, "size": 32, "channels_last": True, "dtype": "bfloat16"},
        {"kind": "step", "which": "MambaHoME", "width": 4, "size": 32, "batch": 1, "dtype": "bfloat16", "channels_last": True, "checkpointing": True},
        pytest.param({"kind": "prediction", "size": 40, "patch": 32, "width": 4}, marks=pytest.mark.long, id="prediction"),
        {"kind": "network", "which": "SegResNet (32)", "size": 32},
        {"kind": "network", "which": "DynUNet (32)", "size": 32},
    ],
    ids=lambda case: case.get("which", case["kind"]),
)
def test_every_kind_of_case_runs(case):
    told = cases.measured(case | {"runs": 1})
    for name in case.get("in_turn", [None]):
        found = told[name] if name else told
        assert found["seconds"] > 0, told
        assert found["detail"].get("error", 0) < 1e-5


def test_patches_are_measured_beside_a_script_that_does_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["benchmarks.data", "patches", "--shape", "40", "44", "36", "--threads", "1"])
    data.main()
    told = json.loads((tmp_path / "data-patches-small.json").read_text())
    assert [row["what"] for row in told["patches"]] == ["homelib", "NIfTI decoded each time"]
    assert all(row["homelib over it"] > 0 for row in told["patches"]), told
    assert "patches/s" in capsys.readouterr().out


def test_the_scripts_prepare_what_homelib_does(tmp_path):
    image, label = data_cases.write_scan(tmp_path, (48, 50, 40))
    for name, one in data_cases.PREPARE.items():
        one(str(image), str(label), tmp_path / name)
    ours = CaseFile.open(tmp_path / "homelib").arrays()
    inner = (slice(4, -4),) * 3  # MONAI smooths zeros in from beyond the scan
    for name, apart in (("MONAI script", 20), ("MONAI script with low-pass", 3)):
        theirs = torch.load(tmp_path / name, weights_only=False)
        assert theirs["image"].shape[1:] == ours[0].shape
        assert np.abs(theirs["image"][0].numpy() - ours[0])[inner].mean() < apart  # HU
        assert ((theirs["label"][0].numpy() > 0) == (ours[1] > 0)).mean() > 0.999


def test_one_scan_is_measured_in_voxels_and_volumes(tmp_path):
    image, label = map(str, data_cases.write_scan(tmp_path, (32, 32, 20)))
    detail, measured = data_cases.prepare(peer="homelib", image=image, label=label, runs=1)
    assert detail["voxels"] == 32 * 32 * 20
    assert detail["volumes"] == pytest.approx(measured.peak_mib * 2**20 / (detail["voxels"] * 4))


def test_a_catalogue_is_listed_looked_up_and_split(capsys):
    told = catalogue.catalogue(30)
    assert [row["seconds"] > 0 for row in told["catalogue"]] == [True, True]
    assert "30 cases: 26 train, 4 validation; 30 good." in capsys.readouterr().out


def test_experts_in_a_loop_are_the_stacked_ones():
    from homelib.network.home import Experts

    for glu in (True, False):
        experts = Experts(3, 6, mult=2, glu=glu)
        x = torch.randn(3, 5, 6)
        torch.testing.assert_close(cases.experts_in_a_loop(experts, x), experts(x))


def test_the_parts_of_a_forward_pass_add_up():
    network = cases.build("MambaHoME", backend="auto", width=4)
    seconds = {}
    with torch.no_grad(), cases.timed_parts(seconds, "cpu"):
        expected = network(torch.zeros(1, 1, 32, 32, 32))
    assert set(seconds) == {"scan", "HoME", "convolutions", "instance norm", "rest"}
    assert all(value > 0 for value in seconds.values())
    with torch.no_grad():  # and everything is back in its place
        torch.testing.assert_close(network(torch.zeros(1, 1, 32, 32, 32)), expected)
    assert seconds.keys() == {"scan", "HoME", "convolutions", "instance norm", "rest"}


def test_ratios_are_over_the_base_among_rows_that_are_alike():
    rows = [
        {"peer": "ours", "tokens": 1, "seconds": 2.0, "peak_mib": 10.0},
        {"peer": "theirs", "tokens": 1, "seconds": 3.0, "peak_mib": 40.0},
        {"peer": "ours", "tokens": 2, "seconds": 5.0, "peak_mib": 1.0},
        {"peer": "theirs", "tokens": 2, "skipped": "not there"},
        {"peer": "theirs", "tokens": 3, "seconds": 1.0, "peak_mib": 1.0},
    ]
    cpu.ratios(rows, "ours", ("tokens",))
    assert [row.get("times slower") for row in rows] == [1.0, 1.5, 1.0, None, None]
    assert [row.get("times memory") for row in rows] == [1.0, 4.0, 1.0, None, None]


def test_an_exponent_is_the_slope_in_logarithms():
    sizes = [10, 100, 1000]
    assert measure.exponent(sizes, [3 * size**1.5 for size in sizes]) == pytest.approx(1.5)


def test_results_name_the_machine_and_its_versions(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "RESULTS", tmp_path / "results")
    kept = json.loads(measure.save("cpu", {"rows": [1]}).read_text())
    assert kept["rows"] == [1]
    assert kept["machine"]["versions"]["torch"] == torch.__version__
    assert kept["machine"]["cores"] >= 1


def test_the_gpu_benchmark_says_that_it_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["benchmarks.gpu"])
    with pytest.raises(SystemExit, match="finds no CUDA GPU here"):
        gpu.main()


def test_kernels_are_told_by_what_they_do():
    names = {
        "_apply_backward": "scan",
        "_gradient": "instance norm",
        "void at::native::batch_norm_backward_kernel<c10::BFloat16>": "instance norm",
        "void cudnn::engines_precompiled::nchwToNhwcKernel<__nv_bfloat16>": "layout of convolutions",
        "sm80_xmma_wgrad_implicit_gemm_indexed_bf16bf16_bf16f32": "convolutions",
        "nvjet_sm90_tss_64x8_64x16_1x4_h_bz_TNT": "matrix products",
        "void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda": "copies",
        "void at::native::reduce_kernel<512, 1>": "sums",
        "void at::native::vectorized_elementwise_kernel<8, at::native::leaky_relu_backward_kernel>": "element by element",
        "void (anonymous namespace)::multi_tensor_apply_kernel<FusedAdam>": "optimiser",  # not the scan's _apply
    }
    assert {name: kernels.does(name) for name in names} == names
    rows = [{"name": name, "milliseconds": 1.0 + i, "launches": 2} for i, name in enumerate(names)]
    told = kernels.by_kind(rows)
    assert told[0] == {"what": "optimiser", "milliseconds": 10.0, "launches": 2}
    assert {"what": "instance norm", "milliseconds": 5.0, "launches": 4} in told
    assert sum(row["milliseconds"] for row in told) == sum(row["milliseconds"] for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_kernels_want_a_gpu():
    with pytest.raises(SystemExit, match="finds no CUDA GPU here"):
        kernels.main()


def test_every_case_of_the_gpu_benchmark_is_one_that_there_is(monkeypatch, tmp_path, capsys):
    """Nothing is measured: each case is held against what its kind takes."""
    asked = []

    def in_process(case, *, threads, patience_seconds):
        case = json.loads(json.dumps(case))
        assert 0 < patience_seconds <= measure.PATIENCE_SECONDS
        for name in ("runs", "warm_up"):
            case.pop(name, None)
        found = {}
        for name, differs in case.pop("in_turn", {"": {}}).items():
            whole = case | differs
            kind = whole.pop("kind")
            inspect.signature(cases.KINDS[kind]).bind(**whole)
            assert whole["device"] == "cuda:0"
            asked.append((kind, whole.get("peer") or whole.get("which")))
            found[name] = {"seconds": 2.0, "peak_mib": 3.0, "detail": {"held_mib": 4.0, "first calls": {"this length": 5.0}}}
        return found.get("", found)

    monkeypatch.setattr(gpu, "in_process", in_process)
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    kept = []
    measured, rows = gpu.run_parts(list(gpu.PARTS), gpu.Bench(gpu.FULL, 1e6), lambda results: kept.append(json.loads(json.dumps(results))))
    assert measured == rows
    assert [set(results) - {"budget_seconds", "part_seconds"} for results in kept] == [set(list(gpu.PARTS)[: n + 1]) for n in range(len(gpu.PARTS))]
    wanted = {"homelib triton", "homelib mamba_ssm", "mambapy pscan", "transformers sequential", "mamba_ssm selective_scan_ref"}
    assert wanted <= {who for kind, who in asked if kind == "scan"}
    assert {"MambaHoME", "SwinUNETR (48)", "SegResNet (32)", "DynUNet (32)"} <= {who for kind, who in asked if kind == "step"}
    recipe = next(row for row in kept[-1]["step"] if row["what"] == "published recipe, our scan")
    assert (recipe["times slower"], recipe["peak_mib"]) == (1.0, 4.0)
    assert "first call, this length" in capsys.readouterr().out
    assert {row["what"].split(",")[0] for row in kept[-1]["scaling"]} == {"scan", "HoME of stage 1", "network"}


def test_what_there_is_no_time_for_is_said_and_kept_and_nothing_measured_is_a_failure(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["benchmarks.gpu", "scan", "prediction", "--seconds", "0"])
    with pytest.raises(SystemExit, match="^1$"):
        gpu.main()
    told = capsys.readouterr().out
    assert "homelib blocked, 110,592 tokens, float32, forward: skipped, no time left of 0 s" in told
    assert "Left out for want of time, 18 of 18 rows: scan: homelib triton" in told
    kept = json.loads((tmp_path / "gpu-scan-prediction.json").read_text())
    assert all("no time left" in row["skipped"] for row in kept["scan"] + kept["prediction"])


BARE = """
import json, sys

sys.modules["pydantic"] = None  # as if it could not be imported
from benchmarks import bare, cases

print(json.dumps(bare.ready(__import__("pathlib").Path(sys.argv[1]))))
import torch
from homelib import MambaHoME, ModelConfig

with torch.device("meta"):
    print(sum(parameter.numel() for parameter in MambaHoME().parameters()))
print(ModelConfig(home="mlp", dispatch="tokens").changed_switches)
case = {"kind": "step", "which": "MambaHoME", "dtype": "float32", "width": 4, "size": 16, "batch": 1, "runs": 1}
print(cases.measured(case)["detail"]["loss"] > 0)
try:
    ModelConfig(chanels=3)
except TypeError as error:
    print(error)
"""


@pytest.mark.long
def test_the_network_is_measured_where_pydantic_cannot_be_imported(tmp_path):
    done = subprocess.run([sys.executable, "-c", BARE, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    told, parameters, switches, ran, unknown = done.stdout.splitlines()
    assert "settings are not checked: pydantic cannot be imported" in told
    assert parameters == "170127611"
    assert switches == "('home', 'dispatch')"
    assert ran == "True"
    assert unknown == "ModelConfig: no field chanels"


def test_carried_wheels_are_unpacked_once_and_come_after_what_is_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert bare.carried(tmp_path) == []
    (tmp_path / "wheels").mkdir()
    for name in ("brought_here-1.2-py3-none-any.whl", "torch-0.1-py3-none-any.whl", "compiled-1.0-cp311-cp311-linux_x86_64.whl"):
        with zipfile.ZipFile(tmp_path / "wheels" / name, "w") as packed:
            packed.writestr(f"{name.split('-')[0]}/__init__.py", "WHERE = 'carried'")
    assert bare.carried(tmp_path) == ["carried, for what is not installed: brought_here-1.2, torch-0.1"]
    folder = Path(sys.path[-1])
    before = folder.stat().st_mtime_ns
    assert {path.name for path in folder.iterdir()} == {"brought_here", "torch"}
    assert importlib.import_module("brought_here").WHERE == "carried"
    assert Path(importlib.util.find_spec("torch").origin) == Path(torch.__file__)
    bare.carried(tmp_path)
    assert folder.stat().st_mtime_ns == before
    assert {path.name for path in tmp_path.iterdir()} == {"wheels", folder.name}


def test_what_compilation_gains_is_a_row_each_with_its_first_calls(monkeypatch, capsys):
    from benchmarks import compile as compiling

    def in_process(case, *, threads):
        """Nothing is compiled here: test_home does that. The layer as it is, run; and the case of the other held against what the kind takes."""
        ways = case.pop("in_turn")
        inspect.signature(cases.block).bind(**{name: value for name, value in (case | ways["compiled"]).items() if name not in ("kind", "runs")})
        return {"as it is": cases.measured(case | ways["as it is"]), "compiled": {"skipped": "no compiler"}}

    monkeypatch.setattr(compiling, "in_process", in_process)
    monkeypatch.setattr(compiling, "TOKENS", (0, 0, 0, 60))
    plain, other = compiling.compiled([4], runs=1, threads=1)["compile"]
    assert (plain["what"], plain["times slower"], other["what"]) == ("stage 4, as it is", 1.0, "stage 4, compiled")
    assert plain["seconds"] > 0 < plain["first call, a third of it"]
    told = capsys.readouterr().out
    assert "first call, half of it" in told
    assert "stage 4, compiled: skipped, no compiler" in told


@pytest.mark.long
def test_the_loop_is_measured_beside_bare_steps_and_with_patches_at_hand():
    from benchmarks import training_cases

    detail, measured = training_cases.loop(profile="smoke", steps=2, accelerator="cpu")
    assert (measured.runs, measured.seconds > 0, detail["bare_seconds"] > 0) == (training_cases.TURNS, True, True)
    detail, measured = training_cases.loading(profile="smoke", steps=2, workers=None, accelerator="cpu")
    assert detail["a batch alone"] > 0
    assert measured.runs == 1


@pytest.mark.parametrize(("identical", "unreadable", "status"), [(True, 0, 0), (False, 0, 1), (True, 1, 1)])
def test_what_became_of_killed_trainings_is_kept_with_the_machine(identical, unreadable, status, tmp_path, monkeypatch, capsys):
    from benchmarks import killed

    found = {"killed": 3, "runs": 2, "steps": [-1, 4, 8], "unreadable": unreadable, "identical": identical}
    monkeypatch.setattr(killed, "kill_and_resume", lambda folder, *, kills, seed: found | {"killed": kills})
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["benchmarks.killed", "--kills", "5", "--seed", "2"])
    with pytest.raises(SystemExit) as end:
        killed.main()
    assert end.value.code == status
    kept = json.loads((tmp_path / "killed.json").read_text())
    assert {name: kept[name] for name in found} == found | {"killed": 5}
    assert (kept["seed"], kept["machine"]["versions"]["torch"], kept["minutes"] >= 0) == (2, torch.__version__, True)


def test_means_over_seeds_have_an_interval_by_hand():
    from benchmarks.three_seeds import over_seeds

    rows = pd.DataFrame({"network": ["a", "a", "a", "b"], "direction": "x", "role": "test", "dice": [0.5, 0.6, 0.7, 0.4]})
    found = over_seeds(rows).set_index("network")
    assert found.loc["a", "dice"] == pytest.approx(0.6)
    assert found.loc["a", "half_width"] == pytest.approx(4.303 * 0.1 / 3**0.5, rel=1e-3)
    assert np.isnan(found.loc["b", "half_width"])


def test_a_run_of_several_seeds_keeps_the_dice_of_every_class_with_and_without_its_largest_piece_alone(tmp_path):
    from benchmarks.three_seeds import over_seeds, train_and_measure

    changes = {"training.steps": 2, "prediction.one_piece": ["liver"], "training.accelerator": "cpu"}
    rows = train_and_measure("smoke", "a-to-c", "MambaHoME", 0, tmp_path, changes)
    assert [(row["role"], row["case"], row["label_origin"]) for row in rows] == [("test", "phantom-c", "SYNTHETIC"), ("train", "phantom-a", "SYNTHETIC")]
    for row in json.loads(json.dumps(rows)):
        whole, pieces = row["dice_by_class"], row["dice_by_class_in_pieces"]
        assert whole.keys() == pieces.keys() >= {"liver", "bone"}
        assert np.nanmean([value for value in whole.values() if value is not None]) == pytest.approx(row["dice"])
        assert all(whole[name] == pieces[name] for name in whole if name != "liver")
    assert len(over_seeds(pd.DataFrame(rows))) == 2


def test_the_package_needs_none_of_the_benchmarks_peers():
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert not any(peer in line for line in needed for peer in ("mambapy", "transformers", "mamba"))


def test_both_measures_of_a_distance_are_taken_on_both_kinds_of_masks(capsys):
    rows = evaluation.distances((24, 24, 16), runs=1)["distances"]
    assert [row["what"] for row in rows] == ["organ, hd95", "organ, hd95_voxels", "blobs, hd95", "blobs, hd95_voxels"]
    assert all(row["times as fast"] == row["MONAI's seconds"] / row["seconds"] for row in rows)
    for kind in ("organ", "blobs"):
        assert all(0.2 < mask.mean() < 0.7 for mask in evaluation.masks(kind, (24, 24, 16)))


@pytest.mark.long
def test_beyond_what_is_stated_a_prediction_takes_the_same_memory_for_any_number_of_classes(capsys):
    """Real peaks of whole processes. Logits of the whole scan would be 0.15 GiB more than is stated with 26 classes, 0.02 with 3; and 0.05 is what
    freed memory that is kept may make of it."""
    few, many = evaluation.predict((128, 128, 160), (3, 26), patch=64)["predict"]
    assert (few["what"], many["what"]) == ("3 classes", "26 classes")
    assert many["peak GiB"] - few["peak GiB"] > 0.15  # there is something to be explained
    assert many["beyond GiB"] == pytest.approx(few["beyond GiB"], abs=0.05)
    assert max(few["beyond GiB"], many["beyond GiB"]) < 0.1  # and home predict had said so before


@pytest.mark.long
def test_a_traced_step_is_measured_beside_one_without_hooks():
    from benchmarks.tracing import WAYS, steps

    found = steps(size=32, width=4, batch=1, runs=1)
    assert tuple(found) == WAYS
    kept = [found[name].detail["kept_mib"] for name in WAYS]
    assert kept[:2] == [0, 0]
    assert 0 < kept[2]
    assert 0 < kept[3]


@pytest.fixture
def grids(monkeypatch, tmp_path):
    """`benchmarks.grid` by its parts' names, each found as it is told, or an error; exit status, and what grid.json then holds."""

    def run(*words: str, **found: dict | Exception) -> tuple[int | str, dict]:
        def part(name):
            def does(folder, still, **options):
                if isinstance(found[name], Exception):
                    raise found[name]
                return dict(found[name])

            return does

        for name, function in (("killed", "killed_and_resumed"), ("arms", "crash_and_hang"), ("slurm", "queued_again")):
            monkeypatch.setattr(grid, function, part(name))
        monkeypatch.setattr("sys.argv", ["benchmarks.grid", *words])
        with pytest.raises((SystemExit, RuntimeError)) as end:
            grid.main()
        return getattr(end.value, "code", "cut off"), json.loads((tmp_path / "grid.json").read_text())

    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    monkeypatch.setattr(grid, "undisturbed", lambda folder: None)
    monkeypatch.setattr(slurm_node, "why_not", lambda: "")
    return run


def test_a_part_of_the_grids_is_saved_when_it_ends_beside_those_before(grids):
    status, told = grids(killed={"runs": 12, "well": True}, arms=RuntimeError("cut off"))
    assert (status, told["killed"]["runs"], "crash and hang" in told) == ("cut off", 12, False)
    status, told = grids("arms", "slurm", arms={"finished": 10, "well": True}, slurm={"runs": 11, "well": False})
    assert status == 1
    assert (told["killed"]["runs"], told["crash and hang"]["finished"], told["slurm"]["runs"]) == (12, 10, 11)
    assert grids("slurm", slurm={"runs": 12, "well": True})[0] == 0


def test_what_another_machine_said_of_the_grids_is_not_kept_beside(grids, monkeypatch):
    grids("killed", killed={"well": True})
    here = measure.machine()
    monkeypatch.setattr(measure, "machine", lambda: here | {"cpu": "another"})
    assert set(grids("arms", arms={"well": True})[1]) == {"machine", "steps a run", "crash and hang"}


def test_where_there_is_no_slurm_the_grid_on_it_is_skipped_with_the_reason(grids, monkeypatch, capsys):
    monkeypatch.setattr(slurm_node, "why_not", lambda: "needs sbatch")
    status, told = grids(killed={"well": True}, arms={"well": True})
    assert (status, "slurm" in told) == (0, False)
    assert "slurm: skipped, needs sbatch" in capsys.readouterr().out
