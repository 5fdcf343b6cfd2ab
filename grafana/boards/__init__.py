"""The three boards, as tables of panels."""

from __future__ import annotations

from grafana.boards.inference import INFERENCE
from grafana.boards.memory import MEMORY
from grafana.boards.repository import REPOSITORY
from grafana.panels import Board

BOARDS: tuple[Board, ...] = (REPOSITORY, MEMORY, INFERENCE)
