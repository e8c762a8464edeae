"""The tasks of the demo: a network, its data, and the recipe at which it explodes unclipped."""

from fastclip.demo.tasks.base import Expectation, Marks, Measure, Recipe, Task
from fastclip.demo.tasks.images import ImageTask, image_task
from fastclip.demo.tasks.reading import TextTask
from fastclip.demo.tasks.registry import FROM_FOLDER, NETWORKS, TASKS, Choices, make_task
from fastclip.demo.tasks.sorting import ACCURACY, SortingTask
from fastclip.demo.tasks.texts import TextsTask

__all__ = [
    "ACCURACY",
    "FROM_FOLDER",
    "NETWORKS",
    "TASKS",
    "Choices",
    "Expectation",
    "ImageTask",
    "Marks",
    "Measure",
    "Recipe",
    "SortingTask",
    "Task",
    "TextTask",
    "TextsTask",
    "image_task",
    "make_task",
]
