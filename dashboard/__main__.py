"""Opens the dashboard: `python -m stageline.dashboard`, run by `stageline dashboard`, becomes Streamlit itself."""

import argparse
import os
import sys
from pathlib import Path


def main() -> None:
    """Replace this process by Streamlit. It listens on this machine only, unless `--host` says otherwise."""
    parser = argparse.ArgumentParser(prog="stageline dashboard")
    parser.add_argument("--store", default="")
    parser.add_argument("--bundles", action="append", default=[])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int)
    given = parser.parse_args()
    script = Path(__file__).with_name("app.py")
    flags = ["--server.address", given.host, "--browser.gatherUsageStats", "false"]
    flags += ["--server.port", str(given.port)] if given.port else []
    own = ["--store", given.store] if given.store else []
    own += [word for folder in given.bundles for word in ("--bundles", folder)]
    os.execv(sys.executable, [sys.executable, "-P", "-m", "streamlit", "run", str(script), *flags, "--", *own])


if __name__ == "__main__":
    main()
