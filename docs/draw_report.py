"""Takes a picture of the report of the founding bug, for the README.

Run: python docs/draw_report.py        (needs Debian's chromium; writes docs/report.png)
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from plot_founding_case import train

from glm4ft.testing.subjects.founding_bug import FoundingBugFormat

SIZE, SCALE = (1000, 1330), 0.8
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic",
         f"--force-device-scale-factor={SCALE}")  # fmt: skip


def main() -> None:
    """Train the founding bug on the demo and take a picture of the top of its report."""
    picture = Path(__file__).parent / "report.png"
    with tempfile.TemporaryDirectory() as folder:
        page = train(FoundingBugFormat, Path(folder)).output / "report.html"
        size = f"--window-size={SIZE[0]},{SIZE[1]}"
        command = ["chromium", *FLAGS, f"--user-data-dir={folder}/profile", size, f"--screenshot={picture}"]
        subprocess.run([*command, page.as_uri()], check=True, capture_output=True)
    print(f"{picture}: {picture.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
