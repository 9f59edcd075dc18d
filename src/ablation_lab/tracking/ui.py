"""MLflow's pages, and addresses that are the same in every store, as its ids aren't: /studies/<name> leads to a study's
variants side by side, /cells/<hash>/<variant> to a cell's run."""

from html import escape

from mlflow.server.fastapi_app import app
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from ablation_lab.tracking import runs, store

WORKFLOW = "workflowType=machine_learning"  # of MLflow's two, the one without language models


def to_run(request: Request) -> Response:
    """Go to the finished run of a cell, or to its latest one."""
    asked = request.path_params["cell_hash"]
    if asked.isalnum():
        client = store.connect()
        experiments = [one.experiment_id for one in client.search_experiments()]
        found = client.search_runs(experiments, f"tags.`ablab.cell_hash` = '{asked}'")
        same = [run for run in found if run.data.tags.get("ablab.variant") == request.path_params["variant"]] or found
        if same:
            run = next((run for run in same if run.info.status == "FINISHED"), same[0])
            return RedirectResponse(f"/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}?{WORKFLOW}")
    where = escape(store.masked(store.uri()))
    return HTMLResponse(f"<p>No run of the cell {escape(asked)} is in {where}. <code>ablab sync</code> adds it.", 404)


def to_study(request: Request) -> Response:
    """Go to the variants of a study, with the columns that compare them."""
    found = store.connect().get_experiment_by_name(request.path_params["study"])
    if found is None:
        return HTMLResponse(f"<p>No study of this name is in {escape(store.masked(store.uri()))}.", 404)
    return RedirectResponse(f"/#/experiments/{found.experiment_id}/runs?{WORKFLOW}&viewStateShareKey={runs.VIEW}")


app.router.routes[:0] = [Route("/cells/{cell_hash}/{variant}", to_run), Route("/studies/{study}", to_study)]
