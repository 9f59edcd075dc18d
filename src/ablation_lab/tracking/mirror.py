"""MLflow made to agree with DVC's files: one finished run a cell, a parent run a variant, the champion."""

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from mlflow.entities import Run
from tqdm import tqdm

from ablation_lab import cell, evaluation, files, params, selection
from ablation_lab.params import Params
from ablation_lab.tracking import runs, served, store
from ablation_lab.tracking.live import Identity
from ablation_lab.words import counted

if TYPE_CHECKING:
    from ablation_lab.report.cell_figures import CellFigures

# A run's final metrics: those that cell.json has, and what evaluation/cells.json calls the others.
ACCURACY = "validation_accuracy"
FROM_CELL = ("train_accuracy", ACCURACY, "best_epoch", "epochs")
SIZES = ("parameters", "macs")  # from the plan
FROM_TEST = {"test_accuracy": "accuracy", "test_loss": "loss"}
FROM_TEST |= {key: key for key in ("macro_f1", *evaluation.BINARY)}

SYNCED = "ablab.synced"  # the digest of what a run has from the files
MODEL = "ablab.model_id"
TIME = "epoch_seconds"
# A view of MLflow's page as its button *Share* keeps one: the variants, the best on validation first.
COLUMNS = (ACCURACY, f"{ACCURACY}_std", "test_accuracy", "test_accuracy_std", *SIZES)
WIDTH = 165  # pixels of a column
VIEW = {"orderByKey": f"metrics.`{ACCURACY}`", "orderByAsc": False, "runsHiddenMode": "FIRST_20_RUNS"}
PARENT = "mlflow.parentRunId"
NOTE = "mlflow.note.content"


@dataclass(frozen=True)
class Record:
    """What the files say of a cell.

    Args:
        history: its epochs, as `cell.history` reads them.
        final: its final metrics.
        status: `ok` or `diverged`.
        network: plan/networks/<variant>.json.
        timing: its timing.json.
        confusion: counts, actual × predicted; None where the test part is not scored.
    """

    identity: Identity
    history: list[dict[str, float]]
    final: dict[str, float]
    status: str
    network: dict[str, Any]
    timing: dict[str, Any]
    confusion: list[list[int]] | None

    @property
    def started(self) -> int:
        """Milliseconds since 1970."""
        return int(1000 * self.timing["started"])

    @property
    def ended(self) -> int:
        return self.started + int(1000 * self.timing["total_seconds"])

    @property
    def digest(self) -> str:
        history = [{key: value for key, value in row.items() if key != TIME} for row in self.history]
        return digest([history, self.final, self.status, self.confusion])

    def metrics(self) -> list[runs.Metric]:
        """All of them, each at the time when it was known."""
        found, clock = [], self.started
        for row in self.history:
            clock += int(1000 * row[TIME])
            found += runs.epoch(row, clock)
        return [*found, *runs.metrics(self.final, 0, self.ended)]


def digest(value: Any) -> str:
    return params.digest(json.dumps(value, sort_keys=True))  # a diverged history has NaN


def sync(root: Path = Path()) -> dict[str, str]:
    """Close the runs whose process died, then go through the cells that are there, in the order of the study.

    A cell's finished run is completed with what it lacks. One that contradicts the files, or is there twice, goes to
    MLflow's trash. Where there is none (the cell came from DVC's cache, or from elsewhere), it is made.

    Raises:
        LabError: when MLflow's store does not work.
    Returns:
        The hashes of the cells that MLflow has, by name: the receipt, which is the same in every clone and every store.
    """
    study = params.load(root / "params.yaml")
    if (root / cell.SELECTION / selection.CHOICE).exists():
        study = selection.both_phases(study, root)
    runs.close_orphans(study.study.name)
    found = list(records(study, root))
    with store.lock("sync"), store.explained():
        mirror = Mirror(study, root)
        mirror.describe()
        for record in tqdm(found, desc="MLflow", unit="cell", disable=None):
            mirror.cell(record)
        by_variant: dict[str, list[Record]] = defaultdict(list)
        for record in found:
            by_variant[record.identity.variant].append(record)
        for own in by_variant.values():
            mirror.variant(own)
        # What a temporary experiment of DVC's finds is not yet what the project says.
        if root.resolve() == files.root().resolve():
            mirror.champion(by_variant)
    return {record.identity.name: record.identity.cell_hash for record in found}


def told(receipt: dict[str, str], root: Path = Path()) -> str:
    """What a user reads after `sync`: how many cells are in MLflow, and where."""
    quick = params.load(root / "params.yaml").study.quick
    return f"{counted(len(receipt), 'cell')} in MLflow: {store.where(root, quick)}"


def records(study: Params, root: Path) -> Iterator[Record]:
    """The cells of today's plans that are there, with their scores as far as they are evaluated."""
    card = files.read_json(root / "data/processed/card.json")
    path = root / "evaluation" / "cells.json"
    scored = {one["cell_hash"]: one for one in files.read_json(path)} if path.exists() else {}
    for name, seed in study.cells:
        folder = cell.folder(name, seed, root)
        if not (folder / cell.RESULT).exists():
            continue
        result, plan_file = files.read_json(folder / cell.RESULT), cell.plan_file(name, root)
        timing = files.read_json(folder / cell.TIMING)
        if result["plan_hash"] != files.sha256(plan_file) or "made" not in timing:
            continue  # of another plan or an older version: `dvc repro` makes today's
        scores = scored.get(result["cell_hash"], {})
        network = files.read_json(cell.plan_file(name, root, "networks/"))
        test = scores.get("test") or {}
        final = {key: result[key] for key in FROM_CELL} | {key: network[key] for key in SIZES}
        final |= {name: test.get(key) for name, key in FROM_TEST.items()}
        yield Record(
            Identity(
                study.study.name,
                name,
                seed,
                result["cell_hash"],
                result["variant_hash"],
                files.read_json(plan_file),
                card,
                timing["made"],
            ),
            cell.history(folder),
            {key: float(value) for key, value in final.items() if value is not None},
            scores.get("status", result["status"]),
            network,
            timing,
            test.get("confusion"),
        )


class Mirror:
    """The study's experiment in MLflow, as it is made to agree with the files."""

    def __init__(self, study: Params, root: Path):
        self.study, self.root = study, root
        self.client, self.experiment = store.open_store(study.study.name)
        self.known = {run.info.run_id: run for run in runs.search(self.client, self.experiment)}
        self.figures: CellFigures | None = None

    def describe(self) -> None:
        """The study's title and notes as the experiment's description, and a view of its variants."""
        about = self.study.study
        title, source = about.title and f"**{about.title}**", about.source and f"Source: {about.source}"
        text = "\n\n".join(part for part in (title, about.notes, source) if part)
        columns = [f"metrics.`{key}`" for key in COLUMNS]
        view = VIEW | {
            "selectedColumns": columns,
            "columnOrder": columns,
            "columnWidths": dict.fromkeys(columns, WIDTH),
            "searchFilter": f"tags.`ablab.level` = '{runs.VARIANT}'",
        }
        known = self.client.get_experiment(self.experiment).tags
        for key, value in {NOTE: text, f"mlflow.sharedViewState.{runs.VIEW}": json.dumps(view)}.items():
            if value and known.get(key) != value:
                self.client.set_experiment_tag(self.experiment, key, value)

    def cell(self, record: Record) -> Run:
        """The one finished run of a cell, with all that the files have."""
        one = record.identity
        run, lacking = self._finished(record)
        if run is not None and run.data.tags.get(SYNCED) == record.digest:
            return run
        if run is None:
            tags = runs.tagged(one, f"{'finetune' if 'start' in one.plan else 'train'}@{one.name}")
            run_id = self._begin(one.name, tags | {"ablab.from": "files"}, record.started)
            runs.describe(self.client, run_id, {**one.plan, "seed": one.seed}, one.card)
        else:
            run_id = run.info.run_id
        runs.log(self.client, run_id, lacking)
        data = {"resize": self.study.data.resize}
        model_id = served.log(self.client, self.experiment, run_id, one, data, self.root)
        if self.figures is None:
            from ablation_lab.report.cell_figures import CellFigures  # where there is something to draw

            self.figures = CellFigures(one.card["classes"])
        with tempfile.TemporaryDirectory() as folder:
            self.figures.draw(one.name, record.history, record.confusion, Path(folder))
            self.client.log_artifacts(run_id, folder, "figures")
        tags = one.made | {MODEL: model_id, "ablab.device": record.timing["device"], runs.STATUS: record.status}
        tags |= {SYNCED: record.digest}
        return self._done(run_id, tags, None if run else record.ended)

    def _begin(self, name: str, tags: dict[str, str], started: int) -> str:
        """A run that is being made: should this process die, it can be told by whom."""
        return self.client.create_run(self.experiment, started, tags | runs.here(), name).info.run_id

    def _done(self, run_id: str, tags: dict[str, str], ended: int | None) -> Run:
        """A run that is whole; it says so last."""
        if ended is not None:
            self.client.set_terminated(run_id, "FINISHED", ended)
        runs.log(self.client, run_id, tags=tags)
        self.known[run_id] = self.client.get_run(run_id)
        return self.known[run_id]

    def _finished(self, record: Record) -> tuple[Run | None, list[runs.Metric]]:
        """A cell's run that agrees with the files, with the metrics that it lacks; all others go to the trash."""
        one = record.identity
        tags = {"ablab.cell_hash": one.cell_hash, "ablab.variant": one.variant, "ablab.seed": str(one.seed)}
        found = [run for run in self._tagged(tags) if run.info.status == "FINISHED"]
        # The one that the files' own training has written comes first, then one that is known to agree.
        seconds = record.history[-1][TIME]
        found.sort(key=lambda run: (run.data.metrics.get(TIME) != seconds, run.data.tags.get(SYNCED) != record.digest))
        kept, lacking = None, record.metrics()
        for run in found:
            some = [] if run.data.tags.get(SYNCED) == record.digest else self._lacking(run, record)
            if kept is None and some is not None:
                kept, lacking = run, some
            else:
                self._delete(run)
        return kept, lacking

    def _lacking(self, run: Run, record: Record) -> list[runs.Metric] | None:
        """The metrics that a run has not; None where one of its epochs says something else than the files."""
        epochs = {(metric.key, metric.step): metric for metric in record.metrics() if metric.step}
        logged = set()
        for key in {key for key, _ in epochs}:
            for metric in self.client.get_metric_history(run.info.run_id, key):
                at = (key, metric.step)
                same = at in epochs and epochs[at].value == metric.value
                # Seconds are another training's of the same cell: they contradict nothing.
                if at in logged or not (same or key == TIME):
                    return None
                logged.add(at)
        final = {key: value for key, value in record.final.items() if run.data.metrics.get(key) != value}
        missing = [metric for at, metric in epochs.items() if at not in logged]
        # The latest is the one that counts, also where the clock has been put back since.
        earlier = [self.client.get_metric_history(run.info.run_id, key) for key in final if key in run.data.metrics]
        latest = max((metric.timestamp for metrics in earlier for metric in metrics), default=0)
        return missing + runs.metrics(final, 0, max(int(1000 * time.time()), latest + 1))

    def variant(self, records: list[Record]) -> None:
        """The parent run of a variant's cells: means over seeds, and their spread (the sample standard deviation)."""
        one, seeds = records[0].identity, ", ".join(str(record.identity.seed) for record in records)
        note = self.study.variants[one.variant].note
        final, history = _means(records)
        tags = {"ablab.level": runs.VARIANT, "ablab.variant": one.variant, "ablab.variant_hash": one.variant_hash}
        parents = self._tagged(tags)
        told = digest([final, history, seeds, note])
        whole = [run for run in parents if run.info.status == "FINISHED"]
        kept = next((run for run in whole if run.data.tags.get(SYNCED) == told), None)
        for run in parents:
            if run is not kept:
                self._delete(run)
        if kept is None:
            differences = [f"- `{row['path']}`: {row['variant']}" for row in records[0].network["differences"]]
            text = f"Variant `{one.variant}`, means over the seeds {seeds}."
            about = "\n\n".join(part for part in (text, note, "\n".join(differences)) if part)
            started, ended = min(one.started for one in records), max(one.ended for one in records)
            run_id = self._begin(one.variant, tags | {"ablab.seeds": seeds, NOTE: about}, started)
            runs.describe(self.client, run_id, one.plan, one.card)
            epochs = [metric for row in history for metric in runs.epoch(row, ended)]
            runs.log(self.client, run_id, [*epochs, *runs.metrics(final, 0, ended)])
            kept = self._done(run_id, {SYNCED: told}, ended)
        for run in self._tagged(tags | {"ablab.level": runs.CELL}):
            if run.data.tags.get(PARENT) != kept.info.run_id:
                self.client.set_tag(run.info.run_id, PARENT, kept.info.run_id)

    def champion(self, by_variant: dict[str, list[Record]]) -> None:
        """Propose the best variant on validation, by its best seed, as the champion; ties go to the first in the study.
        An unfinished study proposes none."""
        if sum(map(len, by_variant.values())) < len(self.study.cells):
            return
        means = {}
        for name, records in by_variant.items():
            values = [record.final[ACCURACY] for record in records if ACCURACY in record.final]
            if len(values) == len(records):  # none has diverged
                means[name] = fmean(values)
        if means:
            best = max(means, key=lambda name: means[name])
            record = max(by_variant[best], key=lambda record: record.final[ACCURACY])
            one = record.identity
            tags = {"ablab.level": runs.CELL, "ablab.cell_hash": one.cell_hash, "ablab.variant": best}
            run = next(run for run in self._tagged(tags) if run.data.tags.get(SYNCED) == record.digest)
            served.crown(self.client, one, run.data.tags[MODEL], run.info.run_id, means[best])

    def _tagged(self, tags: dict[str, str]) -> list[Run]:
        return [run for run in self.known.values() if tags.items() <= run.data.tags.items()]

    def _delete(self, run: Run) -> None:
        self.client.delete_run(run.info.run_id)
        del self.known[run.info.run_id]


def _means(records: list[Record]) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Final metrics and epochs of a variant: means over seeds, of the epochs that all of them have."""
    final: dict[str, float] = {}
    for key in records[0].final:
        values = [record.final[key] for record in records if key in record.final]
        if len(values) == len(records):  # a mean over fewer would flatter the variant
            final[key] = fmean(values)
            if len(values) > 1 and key not in SIZES:
                final[f"{key}_std"] = stdev(values)
    epochs = zip(*(record.history for record in records), strict=False)
    return final, [{key: fmean(row[key] for row in rows) for key in rows[0]} for rows in epochs]
