"""Log lines, each said once in a process."""

import logging

# A child of vLLM's own logger, so that its lines look and go as vLLM's do.
_logger = logging.getLogger("vllm.proxyattn")

_said: set[str] = set()


def _once(level: int, text: str) -> None:
    if text not in _said:
        _said.add(text)
        _logger.log(level, text, stacklevel=3)


def info_once(text: str) -> None:
    _once(logging.INFO, text)


def warn_once(text: str) -> None:
    _once(logging.WARNING, text)


def info(text: str) -> None:
    _logger.info(text, stacklevel=2)
