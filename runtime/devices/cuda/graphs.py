"""CUDA graphs: the work of a stage for one shape and one set of addresses, captured once and replayed."""

from collections.abc import Callable, Hashable

from stageline.runtime.devices.cuda.driver import CudaError, Driver

_CAPTURES = 3  # of a work, before it counts as refused


class Replay:
    """Repeats the same work in one stream: it is enqueued the first time, when libraries may still allocate, captured
    the second time, and replayed from then on. Other work (another `key`: shape and addresses) starts over. What a
    library still allocates ends a capture, but seldom the next one: each work has three of them.

    Used by one thread; owns the captured graph until `close()`.
    """

    def __init__(self, driver: Driver, stream: int) -> None:
        self._driver, self._stream = driver, stream
        self._key: Hashable = None
        self._seen = 0
        self._graph: int | None = None
        self.captures = 0
        """How often work was captured."""
        self._failures = 0
        self.refused: str | None = None
        """Why the work cannot be captured, once known; it is then enqueued each time."""

    @property
    def captured(self) -> bool:
        """Whether the last work is held as a graph."""
        return self._graph is not None

    def run(
        self, key: Hashable, enqueue: Callable[[], None], may_be_captured: Callable[[], bool] = lambda: True
    ) -> None:
        """Do the work: what `enqueue` puts into the stream, and nothing else. `may_be_captured` is asked after it ran
        once."""
        if key != self._key:
            self.close()
            self._key, self._seen, self._failures = key, 0, 0
        if self._graph is None and self._seen and self.refused is None:
            if may_be_captured():
                self._capture(enqueue)
            else:
                self.refused = "it says itself that it cannot be captured"
        self._seen = 1
        if self._graph is not None:
            self._driver.launch(self._graph, self._stream)
        else:
            enqueue()

    def close(self) -> None:
        """Drop the work. What was launched still runs to its end."""
        self._key = None
        if self._graph is not None:
            graph, self._graph = self._graph, None
            self._driver.destroy_graph(graph)

    def _capture(self, enqueue: Callable[[], None]) -> None:
        self._driver.begin_capture(self._stream)
        failure: Exception | None = None
        try:
            enqueue()
        except Exception as error:  # the work cannot be captured; the capture must still be ended
            failure = error
        try:
            graph = self._driver.end_capture(self._stream)
        except CudaError as error:
            if error.sticky:
                raise
            self._failed(failure or error)
            return
        if failure is not None:
            self._driver.destroy_graph(graph)
            self._failed(failure)
            return
        self._graph = graph
        self.captures += 1

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        if self._failures == _CAPTURES:
            self.refused = str(error)
