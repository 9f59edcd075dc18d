"""MLflow's pages, and /cells/<hash>/<variant>, which leads to a cell's run: ids differ between stores, hashes don't."""

from html import escape

from mlflow.server.fastapi_app import app
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from ablation_lab.tracking import store


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
            return RedirectResponse(f"/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}")
    where = escape(store.uri())
    return HTMLResponse(f"<p>No run of the cell {escape(asked)} is in {where}. <code>ablab sync</code> adds it.", 404)


app.router.routes.insert(0, Route("/cells/{cell_hash}/{variant}", to_run))
