#!/usr/bin/env python3
"""Check the locked packages against the known vulnerabilities of OSV, as `make audit` does.

Exit status 1 for a vulnerability that isn't listed in pyproject.toml's `[tool.audit.accepted]`. Where the service can't
be reached that is said, and nothing has been found. `AUDIT_URL` names another one with OSV's interface.
"""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# How pip-audit's own messages tell of a service that doesn't answer, as opposed to a lock file that it can't read.
UNREACHABLE = ("Could not connect", "Connection", "Timeout", "timed out", "Max retries", "Service Unavailable")


def main(locks: list[str]) -> int:
    accepted = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["audit"]["accepted"]
    command = [sys.executable, "-m", "pip_audit", "--vulnerability-service", "osv", "--format", "json"]
    command += ["--disable-pip", "--progress-spinner", "off", "--timeout", "15"]
    command += ["--osv-url", os.environ["AUDIT_URL"]] if os.environ.get("AUDIT_URL") else []
    command += [word for name in accepted for word in ("--ignore-vuln", name)]
    command += [word for lock in locks for word in ("--requirement", lock)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        audited = json.loads(done.stdout)["dependencies"]
    except ValueError:
        reason = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
        if any(word in done.stderr for word in UNREACHABLE):
            print(f"audit: the advisory service can't be reached, so nothing was checked: {reason}")
            return 0
        print(f"audit: Expected pip-audit's findings. Found: {reason}", file=sys.stderr)
        return 1
    found = [(one, weak) for one in audited for weak in one.get("vulns", [])]
    for one, weak in found:
        fixed = ", ".join(weak["fix_versions"]) or "no version yet"
        names = ", ".join([weak["id"], *weak.get("aliases", [])])
        print(f"audit: {one['name']} {one['version']}: {names}, fixed in {fixed}", file=sys.stderr)
    print(f"audit: {len(found)} known vulnerabilities in {len(audited)} packages, {len(accepted)} accepted")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or [str(ROOT / "requirements.lock")]))
