"""placeholder"""

from __future__ import annotations


def main(arguments: list[str]) -> int:
    return 0
