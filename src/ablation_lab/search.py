"""`ablab search`: Optuna proposes values, DVC runs each proposal as an experiment, MLflow tracks it as any other.

DVC's experiments are the only memory. An experiment is named after what fixes its result, so a search that is called
again proposes the same, finds what is there and goes on; cells come from DVC's cache wherever they were trained.
"""

import json
import math
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import optuna
import psutil
from dvc.api import metrics_show
from dvc.exceptions import DvcException
from dvc.utils.hydra import apply_overrides
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, OverrideType, RangeSweep
from hydra.errors import HydraException
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from tabulate import tabulate

from ablation_lab import backend, cell, params
from ablation_lab import plan as planning
from ablation_lab.dvc_command import DVC, environment
from ablation_lab.errors import LabError
from ablation_lab.params import Params

# Random proposals before the sampler has something to learn from. Not a share of the trials: a search with more of them
# starts like one with fewer, so that it can go on from there.
RANDOM_TRIALS = 6
REPEATED = 1000  # proposals in a row that are known already, after which there are no others
DIGITS = 4  # significant ones of a proposed number: what is shown, typed again and trained is the same
# Other pictures or seeds would make the trials' validation results incomparable.
SEARCHED = ("input", "model", "train", "variants")
# How often a training that has to end is asked to, and after how many seconds again.
ATTEMPTS, PAUSE = 4, 5
METRICS = "evaluation/metrics.json"

Values = dict[str, str]  # dotted key → value as it is typed after `-S key=`


@dataclass
class Trial:
    """A combination of values and what came of it; no score says that it failed."""

    values: Values
    experiment: str = ""
    score: float | None = None


def search(root: Path, overrides: Sequence[str], trials: int, seed: int) -> int:
    """Run a search and print a line a trial, the table of all, and how to go on from the best.

    Args:
        overrides: `key=values` in the grammar of `dvc exp run -S`.
        trials: how many combinations in all, those of earlier calls included.
        seed: fixes the proposals, given the scores.

    Returns:
        The exit status: 1 when no trial has a result.
    """
    study = params.load(root / "params.yaml")
    if study.study.test != "sealed":
        raise LabError(
            "study.test: Expected sealed. Found: scored. A search picks by the validation part, and every look at the "
            "test part on the way would make the last one too good. Write `test: sealed` under `study` in params.yaml."
        )
    if study.second:
        raise LabError(
            "finetune.variants: Expected none, since a search compares variants of the first phase. "
            f"Found: {', '.join(study.second_names)}. Search first, and put them back for what was found."
        )
    fixed, space = parse(overrides, params.read(root / "params.yaml")[0])
    backend.use_cpu_only()
    # Trials take the pictures from DVC's cache instead of preparing them again, each for itself.
    if subprocess.run([*DVC, "repro", "--quiet", "preprocess"], cwd=root, env=environment(), check=False).returncode:
        raise LabError("Expected pictures to train with. Found: `dvc repro preprocess` failed, see above.")
    done: list[Trial] = []

    def objective(values: Values) -> float:
        trial = Trial(values)
        done.append(trial)
        settings = ", ".join(f"{key}={value}" for key, value in values.items())
        print(f"{len(done)}/{trials}  {settings}: ", end="", flush=True)
        typed = [*fixed, *(f"{key}={value}" for key, value in values.items())]
        try:
            trial.experiment = _experiment_name(root, changed(root, typed))
        except LabError as error:
            if len(done) == 1:
                print()
                raise LabError(f"The first combination, {settings}: {error}\n       {_WHOLE}") from None
            print(f"failed: {error}", flush=True)
            return 0.0
        try:
            trained = _ensure(root, trial.experiment, typed)
            trial.score = _score(root, trial.experiment, study.study.baseline)
        except LabError as error:
            print(f"failed: {error}", flush=True)
            return 0.0
        best = max(one.score for one in done if one.score is not None)
        print(f"validation accuracy {trial.score:.4f}, best {best:.4f} ({trained})", flush=True)
        return trial.score

    try:
        maximise(space, objective, trials, seed)
    except KeyboardInterrupt:
        print("\ninterrupted: the finished trials are kept, the same command goes on from there", file=sys.stderr)
        return 130
    if len(done) < trials:
        print(f"There are no more than these {len(done)} combinations.")
    print(f"\n{_table(done)}")
    scored = [trial for trial in done if trial.score is not None]
    if not scored:
        return 1
    best = max(scored, key=lambda trial: trial.score or 0.0)
    print(
        f"\nBest: {best.experiment}. Make it the current study, then score it on the test part, which trains nothing:\n"
        f"  dvc exp apply {best.experiment}\n  dvc exp run -S study.test=scored"
    )
    return 0


_WHOLE = "For whole numbers write int(interval(16, 256)), on a logarithmic scale tag(log, int(interval(16, 256)))."


def parse(overrides: Sequence[str], raw: Mapping[str, Any]) -> tuple[list[str], dict[str, BaseDistribution]]:
    """What is searched, from `key=values` in Hydra's override grammar, which DVC's `-S` takes too.

    `1,2,3` and `choice(…)` are choices without an order, `range(start, stop, step)` has one and leaves `stop` out,
    `interval(low, high)` is continuous; `int(…)` makes it whole and `tag(log, …)` logarithmic.

    Args:
        raw: params.yaml as it is parsed.

    Returns:
        The overrides with one value, which all trials get, and what the others vary over, by key.
    Raises:
        LabError: for what is no override, a key that is not in params.yaml, and an impossible range.
    """
    known = _keys(raw)
    fixed: list[str] = []
    space: dict[str, BaseDistribution] = {}
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
            value = override.value()
        except (HydraException, ValueError) as error:
            raise LabError(f"-S {text}: Expected KEY=VALUES. Found: {str(error).splitlines()[0]}.") from None
        key = override.key_or_group
        if override.type is not OverrideType.CHANGE or key not in known:
            near = get_close_matches(key, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise LabError(
                f"-S {text}: Expected a key that is in params.yaml, under {', '.join(SEARCHED)}. Found: {key}.{hint}"
            )
        if override.is_sweep_override():
            space[key] = _distribution(text, value)
        else:
            fixed.append(text)
    if not space:
        raise LabError(
            f"-S: Expected at least one key with several values, like train.batch_size=16,32. Found: {overrides}."
        )
    return fixed, space


def _distribution(text: str, value: Any) -> BaseDistribution:
    try:
        match value:
            case ChoiceSweep():
                return CategoricalDistribution([_typed(element) for element in value.list])
            case RangeSweep():
                steps = list(value.range())
                if all(isinstance(step, int) for step in steps):
                    return IntDistribution(min(steps), max(steps), step=abs(int(value.step or 1)))
                return FloatDistribution(float(min(steps)), float(max(steps)), step=abs(float(value.step or 1)))
            case IntervalSweep():
                low, high, log = value.start or 0, value.end or 0, "log" in value.tags
                if "int" in value.tags or (isinstance(low, int) and isinstance(high, int)):
                    return IntDistribution(int(low), int(high), log=log)
                return FloatDistribution(float(low), float(high), log=log)
    except (ValueError, TypeError) as error:
        raise LabError(f"-S {text}: Expected values in a range that is not empty. Found: {error}") from None
    raise LabError(f"-S {text}: Expected values, choice(…), range(…) or interval(…). Found: a pattern.")


def _typed(element: Any) -> str:
    """A value as it is typed in an override."""
    return str(Override._get_value_element_as_str(element))


def maximise(
    space: Mapping[str, BaseDistribution], objective: Callable[[Values], float], trials: int, seed: int
) -> None:
    """Call `objective` with so many different combinations, each proposed by what the earlier ones gave (TPE: Bergstra
    et al., Algorithms for Hyper-Parameter Optimization, 2011); fewer where there are no more of them."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    tpe = optuna.samplers.TPESampler(seed=seed, n_startup_trials=RANDOM_TRIALS)
    random = optuna.samplers.RandomSampler(seed=seed)
    proposals = optuna.create_study(direction="maximize", sampler=tpe)
    seen: set[tuple[str, ...]] = set()
    repeated = 0  # in a row: rounded, even a continuous range may hold few values
    while len(seen) < min(trials, math.prod(_count(one) for one in space.values())) and repeated < REPEATED:
        proposal = proposals.ask(dict(space))
        values = {key: _text(proposal.params[key], space[key]) for key in space}
        if tuple(values.values()) in seen:
            # TPE would go on proposing it: what it has learned since is nothing.
            proposals.tell(proposal, state=TrialState.FAIL)
            proposals.sampler = random
            repeated += 1
            continue
        repeated = 0
        seen.add(tuple(values.values()))
        proposals.tell(proposal, objective(values))
        proposals.sampler = tpe


def _count(distribution: BaseDistribution) -> float:
    match distribution:
        case CategoricalDistribution():
            return len(set(distribution.choices))
        case IntDistribution():
            return (distribution.high - distribution.low) // distribution.step + 1
        case FloatDistribution() if distribution.step:
            return round((distribution.high - distribution.low) / distribution.step) + 1
    return 1 if distribution.single() else math.inf


def _text(value: Any, distribution: BaseDistribution) -> str:
    if isinstance(distribution, FloatDistribution):
        rounded = float(f"{value:.{DIGITS}g}")
        return repr(min(max(rounded, distribution.low), distribution.high))
    return str(value)


def changed(root: Path, overrides: Sequence[str]) -> Params:
    """The current study with overrides, made by DVC's own function.

    Raises:
        LabError: when this is no valid study.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "params.yaml"
        shutil.copyfile(root / "params.yaml", copy)
        try:
            apply_overrides(copy, list(overrides))
        except DvcException as error:
            raise LabError(f"-S: Expected values that DVC takes. Found: {error.__cause__ or error}") from None
        return params.validate(params.read(copy)[0])


def _experiment_name(root: Path, study: Params) -> str:
    """A name made of all that fixes the result, for trials with the same cells are the same trial.

    Raises:
        LabError: when a network of the study can't be built.
    """
    image_shape, classes, _, pictures, data_digest = planning.pictures(study, root)
    described = planning.describe(study, image_shape, len(classes), root, pictures)
    code = cell.training_code(root)
    hashes = [
        [name, seed, cell.cell_hash(described[name]["plan_hash"], seed, data_digest or "", code)]
        for name, seed in study.cells
    ]
    return f"search-{params.digest(json.dumps([study.study.baseline, hashes]))[:10]}"


def _ensure(root: Path, experiment: str, overrides: Sequence[str]) -> str:
    """Run an experiment unless it is there.

    DVC runs it in a folder of its own: whatever happens to it, the user's params.yaml and results stay as they are.

    Returns:
        What was trained, in words.
    Raises:
        LabError: with what the stage that failed has said.
    """
    if _commit(root, experiment):
        return "known"
    # The whole pipeline: DVC does not apply an experiment that lacks an output, as the report.
    command = [*DVC, "exp", "run", "--temp", "--name", experiment]
    command += [word for override in overrides for word in ("-S", override)]
    # A session of its own: Ctrl-C is for this process, which then ends the training and lets DVC tidy up.
    process = subprocess.Popen(
        command,
        cwd=root,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate()
    except BaseException:
        _interrupt(process)
        raise
    if process.returncode:
        raise LabError(_reason(output))
    cells = output.count("Running stage 'train@")
    return f"{cells} cell{'s' * (cells != 1)} trained" if cells else "nothing trained"


def _interrupt(process: subprocess.Popen) -> None:
    """End an experiment as Ctrl-C ends a stage: DVC then fails the stage and takes the experiment's folder away."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an impatient second Ctrl-C would leave the training running
    dvc = psutil.Process(process.pid)
    told = 0
    while process.poll() is None:
        with suppress(psutil.NoSuchProcess):
            stages = dvc.children(recursive=True)
            # TensorFlow loses a signal now and then: it is sent again, and in the end one that can't be lost.
            for one in stages or ([] if told else [dvc]):
                one.send_signal(signal.SIGINT if told < ATTEMPTS else signal.SIGKILL)
        told += 1
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=PAUSE)


def _reason(output: str) -> str:
    """What a failed stage has said to the user, else the end of what DVC has said."""
    lines = output.splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    if not starts:
        return "\n".join(["", *lines[-15:]])
    told = [lines[starts[0]].removeprefix("error: ")]
    for line in lines[starts[0] + 1 :]:
        if not line.startswith(" "):
            break
        told.append(line)
    return "\n".join(told)


def _commit(root: Path, experiment: str) -> str | None:
    """The commit of an experiment that starts from the current one."""
    head = _git(root, "rev-parse", "HEAD")
    if head is None:
        raise LabError(f"{root}: Expected a git repository with a commit, for experiments start from one. Found: none.")
    return _git(root, "rev-parse", "--verify", "--quiet", f"refs/exps/{head[:2]}/{head[2:]}/{experiment}")


def _git(root: Path, *arguments: str) -> str | None:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _score(root: Path, experiment: str, baseline: str) -> float:
    """The baseline's mean validation accuracy; 0 when a training diverged."""
    try:
        metrics = metrics_show(METRICS, repo=str(root), rev=_commit(root, experiment))
        return float(metrics[baseline]["validation_accuracy"] or 0.0)
    except (DvcException, OSError, KeyError) as error:
        raise LabError(
            f"{experiment}: Expected {METRICS} in DVC's cache. Found: {type(error).__name__}. "
            f"Run `dvc exp remove {experiment}` and search again."
        ) from None


def _keys(raw: Mapping[str, Any]) -> list[str]:
    """All dotted keys below the sections that may be searched."""

    def below(value: Any, prefix: str) -> list[str]:
        if not isinstance(value, dict):
            return []
        return [
            found for key, inside in value.items() for found in (f"{prefix}{key}", *below(inside, f"{prefix}{key}."))
        ]

    return [key for section in SEARCHED for key in below(raw.get(section), f"{section}.")]


def _table(done: Sequence[Trial]) -> str:
    """All trials, the best first, the failed ones last."""
    numbered = sorted(enumerate(done, 1), key=lambda one: -1.0 if one[1].score is None else one[1].score, reverse=True)
    rows = [
        [number, *trial.values.values(), "failed" if trial.score is None else f"{trial.score:.4f}", trial.experiment]
        for number, trial in numbered
    ]
    headers = ["trial", *(done[0].values if done else ()), "validation accuracy", "experiment"]
    return tabulate(rows, headers, disable_numparse=True)
