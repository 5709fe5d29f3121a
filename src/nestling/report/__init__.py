"""What a run found, shown: one HTML page that needs no network, a picture of the front, Markdown and JSON."""

from nestling.report.content import LayerBits, Member, ReportContent, TrainingPoint, TriedArch, Tuned
from nestling.report.page import ReportFiles, report_html, write_report
from nestling.report.profile_page import profile_html

__all__ = [
    "LayerBits",
    "Member",
    "ReportContent",
    "ReportFiles",
    "TrainingPoint",
    "TriedArch",
    "Tuned",
    "profile_html",
    "report_html",
    "write_report",
]
