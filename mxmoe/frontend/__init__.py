"""Lifting the experts of a torch module into the IR, and putting compiled ones back in their place."""

from mxmoe.frontend.families import FAMILIES, REFUSED, Family
from mxmoe.frontend.joined import JoinedCalls, join_calls
from mxmoe.frontend.lift import lift
from mxmoe.frontend.lifted import BankKind, Lifted, LiftedBank, LiftedBlock
from mxmoe.frontend.places import places_of
from mxmoe.frontend.report import LiftReport, Skipped, Taken
from mxmoe.frontend.substitute import BankRun, Replacement, replace_banks
from mxmoe.frontend.views import ExpertViews, expert_views

__all__ = [
    "FAMILIES",
    "REFUSED",
    "BankKind",
    "BankRun",
    "ExpertViews",
    "Family",
    "JoinedCalls",
    "LiftReport",
    "Lifted",
    "LiftedBank",
    "LiftedBlock",
    "Replacement",
    "Skipped",
    "Taken",
    "expert_views",
    "join_calls",
    "lift",
    "places_of",
    "replace_banks",
]
