"""The report of a run: report.html, one self-contained page to read, and report.json, the same figures for programs.

    report = collect_run(run, order)   # order: the names of all stages; reads the run's manifest
    write(report)                      # run/report.html, run/report.json

`collect` reads artifacts and metrics.jsonl, and computes no pictures; `to_json` and `to_html` are pure. No stage is
imported.
"""

from gristmill.report.collect import Report, collect, collect_run
from gristmill.report.figures import to_json
from gristmill.report.page import to_html, write

__all__ = ["Report", "collect", "collect_run", "to_html", "to_json", "write"]
