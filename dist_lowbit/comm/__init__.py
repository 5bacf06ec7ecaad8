"""Floor 1: who talks to whom. Knows ranks and bytes; nothing of models or formats."""

from .backends import AUTO, BACKENDS, init_group, subgroup_info, why_not
from .group import Group
from .single import SingleGroup
from .tree import postfix, tree_sum

__all__ = ["AUTO", "BACKENDS", "Group", "SingleGroup", "init_group", "postfix", "subgroup_info", "tree_sum", "why_not"]
