"""`ablab ui` in a real browser, on cells that were trained for real."""

import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import browser
import pytest
from conftest import client_of, environment, in_mlflow, passed, run
from playwright.sync_api import Page, expect

PATIENCE = 60_000  # milliseconds

pytestmark = browser.needed


@pytest.fixture(scope="module")
def address(trained_project: Path) -> Iterator[str]:
    """Where the pages of the tiny study are."""
    passed(run(trained_project, "ablab", "sync"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["ablab", "ui", "--port", str(port)]
    with subprocess.Popen(
        command,
        cwd=trained_project,
        env=environment(trained_project),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as ui:
        address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(f"{address}/health", timeout=5):
                    break
            except OSError:
                assert time.monotonic() < deadline, "the UI did not answer"
                time.sleep(0.5)
        yield address
        os.killpg(ui.pid, signal.SIGINT)


@pytest.fixture
def page(address: str) -> Iterator[Page]:
    with browser.chromium() as chromium:
        page = chromium.new_page(viewport={"width": 1400, "height": 900})
        page.set_default_timeout(PATIENCE)
        expect.set_options(timeout=PATIENCE)
        yield page


def test_the_variants_of_a_study_are_compared_by_validation_accuracy(trained_project: Path, address: str, page: Page):
    page.goto(f"{address}/studies/tiny")
    found = {one.data.tags["ablab.variant"] for one in in_mlflow(trained_project).values()}
    for name in found:
        expect(page.get_by_role("link", name=name, exact=True)).to_be_visible()
    table = page.locator(".ag-root")
    client = client_of(trained_project)
    for one in client.search_runs(["1"], "tags.`ablab.level` = 'variant'"):
        shown = f"{one.data.metrics['validation_accuracy']:.6f}"[:7].rstrip("0")  # MLflow shows no zeros at the end
        expect(table.get_by_text(re.compile(rf"^{re.escape(shown)}")).first).to_be_visible()
    for cell in in_mlflow(trained_project):
        expect(page.get_by_role("link", name=cell, exact=True)).to_have_count(0)


def test_a_link_of_the_report_leads_to_the_cells_run_and_its_figures(trained_project: Path, address: str, page: Page):
    html = (trained_project / "reports/report.html").read_text()
    links = re.findall(r'href="http://127\.0\.0\.1:5000(/cells/[^"]+)"', html)
    logged = in_mlflow(trained_project)["baseline-0"]
    (link,) = (link for link in links if logged.data.tags["ablab.cell_hash"] in link)
    page.goto(address + link)
    expect(page.get_by_role("heading", name="baseline-0")).to_be_visible()
    assert logged.info.run_id in page.url
    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_text("figures", exact=True).click()
    for name in ("curves.png", "confusion_matrix.png"):
        page.get_by_text(name, exact=True).first.click()
        expect(page.get_by_text(f"figures/{name}", exact=True)).to_be_visible()
        page.wait_for_function("() => [...document.images].some(image => image.naturalWidth > 600)")
