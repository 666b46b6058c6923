"""A fuzzer: random small models, trained under random plans and compared with themselves bit by bit."""

from tests.fuzz.menu import MENU, Sizes
from tests.fuzz.program import Input, Line, Output, Program
from tests.fuzz.trial import Refused, Trial, check, trials

__all__ = ["MENU", "Input", "Line", "Output", "Program", "Refused", "Sizes", "Trial", "check", "trials"]
