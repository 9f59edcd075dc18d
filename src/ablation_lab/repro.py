"""`dvc repro` with its cells side by side.

DVC says which cells are due. An engine trains them, on this machine (`parallel.py`) or on a cluster (`cluster.py`).
From there they are taken all at once, through DVC, as if its stages had trained them; `dvc repro` does the rest. What
is kept, locked, cached and tracked is what `dvc repro` alone makes.
"""

import sys
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path

from ablation_lab import cell, files, jobs, params, resume, runner, selection
from ablation_lab.dvc_command import call, due, keep, locked, prepare, put_in_order
from ablation_lab.errors import LabError


def repro(root: Path, at_a_time: int | None, engine: str = "local", address: str | None = None) -> int:
    """Bring the project up to date.

    Args:
        at_a_time: cells; None for as many as there is room for.
        engine: `local` or `ray`.
        address: of a Ray cluster; None starts one on this machine, for this call.

    Returns:
        The exit status: that of `dvc repro`, or 1 when a cell has failed; the others are then kept.

    Raises:
        LabError: when the code that is running is not the project's.
    """
    before = locked(root)
    try:
        return _repro(root, at_a_time, engine, address)
    finally:
        with suppress(LabError):  # another DVC is at work: the order is no reason to fail
            put_in_order(root, before)


def _repro(root: Path, at_a_time: int | None, engine: str, address: str | None) -> int:
    here, own = Path(__file__).resolve().parent, (root / "src" / "ablation_lab").resolve()
    if here != own:
        raise LabError(
            f"{root}: Expected this project's own `ablab`, as its code is part of a cell. Found: that of {here}. "
            f"Set its environment up (`make setup`) and use it, or set PYTHONPATH to {root / 'src'}."
        )
    prepare(root)
    code = cell.training_code(root)
    with _engine(engine, address, root, code) as train:
        if status := call(root, "repro", "plan"):
            return status
        study = params.load(root / "params.yaml")
        card = files.read_json(root / runner.DATA / "card.json")
        for stage, variants in (("train", study.variants), ("finetune", study.second_names)):
            if not variants:
                continue
            if stage == "finetune" and (status := call(root, "repro", "select")):
                return status
            cells = {f"{stage}@{variant}-{seed}": (variant, seed) for variant in variants for seed in study.seeds}
            waiting = [jobs.job(stage, *cells[name], root, code, card) for name in due(root, list(cells))]
            if not waiting:
                continue
            remark = _Unaffected(study, root, stage, waiting)
            for job in waiting:
                job.remark = remark
            once = {job.wanted: job for job in reversed(waiting)}
            train(sorted(once.values(), key=lambda job: -job.cost), at_a_time)
            for job in waiting:
                job.failure = once[job.wanted].failure
                if not job.failure and (told := remark(job)):  # of cells that another machine has trained
                    print(f"warning: {told}", file=sys.stderr)
            failed, good = ([job for job in waiting if bool(job.failure) is ended] for ended in (True, False))
            if engine == "local":
                _keep(good, root)
            if failed:
                # What has been trained is kept, what is in DVC's cache comes from there; DVC alone would try the
                # failed cells once more.
                lost = {job.stage_name for job in failed}
                if others := [name for name in cells if name not in lost]:
                    call(root, "repro", "--keep-going", "--single-item", *others)
                for job in failed:
                    print(f"\nerror: {job.stage_name}: {job.failure}", file=sys.stderr)
                _report_the_others(study, failed, root)
                return 1
    return call(root, "repro")


class _Unaffected:
    """Says of a change that it had no effect, as soon as a cell and its reference's of the same seed are trained."""

    def __init__(self, study: params.Params, root: Path, stage: str, waiting: list[jobs.Job]):
        variants = study.variants
        if stage == "finetune":
            chosen = files.read_json(root / cell.SELECTION / selection.CHOICE)["variant"]
            variants = study.second[chosen]
        self.root = root
        self.pairs = {
            (name, reference)
            for name, variant in variants.items()
            for reference in (variant.compared_with, study.study.baseline if stage == "train" else None)
            if reference and reference != name
        }
        self.due = {(job.variant, job.seed): job.wanted for job in waiting}

    def __call__(self, job: jobs.Job) -> str:
        told = []
        for name, reference in sorted(self.pairs):
            if job.variant in (name, reference) and self._equal(name, reference, job.seed):
                self.pairs.discard((name, reference))
                told.append(
                    f"{name}: this change had no effect with seed {job.seed}: weights and predictions are byte for "
                    f"byte those of {reference}"
                )
        return "; ".join(told)

    def _equal(self, name: str, reference: str, seed: int) -> bool:
        mine, other = self._cell(name, seed), self._cell(reference, seed)
        if mine is None or other is None:
            return False
        results = [files.read_json(folder / cell.RESULT) for folder in (mine, other)]
        # Equal hashes are one training, of which the plan has warned.
        if results[0]["cell_hash"] == results[1]["cell_hash"] or "diverged" in [one["status"] for one in results]:
            return False
        return all(files.sha256(mine / one) == files.sha256(other / one) for one in (cell.PREDICTIONS, cell.WEIGHTS))

    def _cell(self, name: str, seed: int) -> Path | None:
        """Where a finished cell of today's plan is: in its place, or among those of earlier calls."""
        wanted = self.due.get((name, seed))
        there = cell.folder(name, seed, self.root)
        if wanted is None:
            return there if (there / cell.RESULT).exists() else None
        places = (self.root / resume.FOLDER / wanted / resume.READY, there)
        return next((place for place in places if cell.is_finished(place, wanted)), None)


def _keep(trained: list[jobs.Job], root: Path) -> None:
    """Have DVC keep what was trained. Of equal cells the first: the others' stages share its result."""
    wanted = {job.stage_name: job.wanted for job in trained}
    makers = {job.stage_name: partial(runner.take, job.stage, job.variant, job.seed) for job in trained}
    keep(root, makers, lambda name: runner.taken(wanted[name]))


def _report_the_others(study: params.Params, failed: list[jobs.Job], root: Path) -> None:
    """Report the cells that are there, and say what a user can do about those that failed."""
    from ablation_lab.report import partial

    try:
        print(f"\n{partial.write_partial(study, root, {(job.variant, job.seed): job.failure for job in failed})}")
    except LabError as error:
        print(f"\nNo partial report: {error}", file=sys.stderr)
    sys.stdout.flush()
    if (root / "reports/report.html").exists():
        print("\nreports/report.html is the report of an earlier state: it was not made again.", file=sys.stderr)
    names = [name for name in dict.fromkeys(job.variant for job in failed) if name != study.study.baseline]
    if names:
        print(
            f"\nFor the whole report without {' and '.join(names)}, remove {'it' if len(names) == 1 else 'them'} from "
            "params.yaml and run `ablab repro`: the other cells are kept, none of them is trained again.",
            file=sys.stderr,
        )


def _engine(name: str, address: str | None, root: Path, code: dict[str, str]) -> AbstractContextManager[jobs.Engine]:
    if name == "ray":
        from ablation_lab import cluster

        return cluster.engine(root, code, address)
    from ablation_lab import parallel

    return parallel.engine(root, code)
