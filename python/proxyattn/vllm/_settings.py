"""What ``--additional-config '{"proxyattn": {...}}'`` can say."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from proxyattn.settings import Settings

KEY = "proxyattn"


@dataclass(frozen=True)
class ServingSettings:
    """Which rows run sparse, and how.

    A row, the tokens of one request in one step, is long where it sees ``min_seqlen`` keys, cached
    ones included, and brings ``min_queries`` new tokens. Others run dense: from 4096 keys on the
    least budgets of both modes leave blocks out, and what each head needs is estimated anew for
    each row, which few queries don't repay.
    """

    settings: Settings
    min_seqlen: int = 4096
    min_queries: int = 128

    @classmethod
    def from_config(cls, additional_config: Any) -> "ServingSettings":
        """From vLLM's ``additional_config``, all of it.

        Raises:
            ValueError: for a name that is no setting, or a value that can't be one.
        """
        given = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
        given = {} if given is None else given
        if not isinstance(given, Mapping):
            raise ValueError(
                f"proxyattn.vllm: additional_config[{KEY!r}] must hold names and values, got "
                f"{given!r}"
            )
        own = [field.name for field in fields(cls) if field.name != "settings"]
        names = [*own, *(field.name for field in fields(Settings))]
        for name in given:
            if name not in names:
                raise ValueError(
                    f"proxyattn.vllm: settings must be among {', '.join(names)}, got {name!r}"
                )
        for name in own:
            value = given.get(name, 1)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"proxyattn.vllm: {name} must be an integer of at least 1, got {value!r}"
                )
        settings = Settings.from_dict({key: given[key] for key in given if key not in own})
        return cls(settings, **{name: given[name] for name in own if name in given})
