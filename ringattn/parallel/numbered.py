"""Host objects by number, for operators that take only tensors and numbers.

A compiled graph cannot hold a Layout: it would be compiled anew for every batch. It holds a tensor with the layout's
number instead. The table keeps nothing alive.
"""

from itertools import count
from typing import Any
from weakref import WeakValueDictionary

_objects: WeakValueDictionary[int, Any] = WeakValueDictionary()
_numbers = count()


def number_of(value: Any) -> int:
    """A new number for `value`, never given again in this process."""
    number = next(_numbers)
    _objects[number] = value
    return number


def by_number(number: int) -> Any:
    """The object of a number. It must still be alive: whoever calls the operator holds it."""
    return _objects[number]
