"""The processes of models: every instance of a python-based model is a child of tritonserver that
carries `<model>_<group>_<number>` in its command line.
"""

from __future__ import annotations

import re

import psutil

_INSTANCE = re.compile(r"(.+)_\d+_\d+")


def model_processes(triton_pid: int, model: str) -> list[psutil.Process]:
    """The living processes of a model's instances."""
    found = []
    try:
        children = psutil.Process(triton_pid).children()
    except psutil.Error:
        return []
    for process in children:
        try:
            named = (_INSTANCE.fullmatch(word) for word in process.cmdline()[-2:])
            ours = any(match is not None and match[1] == model for match in named)
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def dead_children(triton_pid: int, since_s: float) -> set[int]:
    """Process ids of children started since then (`time.time`) that ended and are still known."""
    found = set()
    try:
        for child in psutil.Process(triton_pid).children():
            if child.create_time() >= since_s and child.status() == psutil.STATUS_ZOMBIE:
                found.add(child.pid)
    except psutil.Error:
        return set()
    return found
