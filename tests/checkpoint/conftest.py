import logging

import pytest


@pytest.fixture(autouse=True)
def heard_loggers(monkeypatch):
    """detectron2's setup_logger, called by any other test, stops `caplog` from hearing these."""
    for name in ("dn_detr", "detectron2"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
