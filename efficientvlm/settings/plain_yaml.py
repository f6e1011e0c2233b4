"""The one door for YAML of others: recipes, `--set`, the head of a model card. Plain data comes in, or three lines say why not."""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from efficientvlm.errors import BadInput


class _Loader(yaml.SafeLoader):
    """Plain data only; a key twice in one mapping is an error, and so are anchors, which can grow without bound."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ConstructorError(None, None, "references with * are not allowed", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for part, _ in node.value:
            key = self.construct_object(part, deep=True)
            if not isinstance(key, str):
                raise ConstructorError(None, None, f"the key {key!r} is not a text", part.start_mark)
            if key in seen:
                raise ConstructorError(None, None, f"the key {key} is there twice", part.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 reads 3e-4 as text, for want of a point
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789"))


def parse_yaml(text: str, what: str, fix: str) -> Any:
    """The content of `text`: mappings with text as keys, lists, texts, numbers, and what else YAML has names for (dates, bytes).

    Raises:
        BadInput: `what` is not valid YAML, or the library fails on it in whatever way; `fix` says what to do.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - derives from SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        why = f"line {mark.line + 1}: " if mark else ""
        why += " ".join(str(getattr(error, "problem", None) or getattr(error, "reason", None) or error).split())
    except RecursionError:
        why = "it is nested too deeply"
    except Exception as error:  # noqa: BLE001 - the library's constructors raise whatever a wrong value makes of them
        why = f"a value is not of the type it names ({str(error) or type(error).__name__})"
    raise BadInput(f"{what} is not valid YAML", why, fix)
