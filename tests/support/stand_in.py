"""A stand-in for the engine."""
from __future__ import annotations
import threading
from typing import Any
from tokenswift_py.options import Options
from tokenswift_py.runs.plan import prepare

class Busy(RuntimeError):
    pass

class Text:
    def __init__(self, engine, run):
        self.engine, self.run, self.prompt = engine, run, run.prompt
        self.pieces, self.listeners, self.lock = [], [], threading.Lock()
        self.done, self.cancelled, self.error = False, False, None
        self.over = threading.Event()
    def listen(self, tell):
        with self.lock:
            for p in self.pieces: tell(p)
            if self.done: tell(None)
            else: self.listeners.append(tell)
    def cancel(self): self.cancelled = True
    def result(self, timeout=None):
        assert self.over.wait(timeout)
        if self.error: raise self.error
        return self.final
    def work(self):
        from tokenswift_py.runs.stream import Stream
        e = self.engine
        try:
            with e.mutex:
                stream = Stream(e.loaded, self.run)
            it = iter(stream)
            while not self.cancelled:
                with e.mutex:
                    piece = next(it, None)
                if piece is None: break
                with self.lock:
                    self.pieces.append(piece)
                    for l in self.listeners: l(piece)
                    e.count["generated_tokens"] += len(piece.tokens)
            with e.mutex:
                stream.close(); self.final = stream.result()
            e.count["finished"][self.final.ending] = e.count["finished"].get(self.final.ending, 0) + 1
        except Exception as x:
            self.error = x
        e.live.discard(self)
        with self.lock:
            self.done = True; self.over.set()
            for l in self.listeners: l(None)

class Engine:
    def __init__(self, loaded, context=None, *, drafter="auto", most_running=16, most_waiting=64, kv_tokens=None):
        self.loaded, self.context = loaded, context or loaded.checkpoint.config.max_position_embeddings
        self.most = most_running + most_waiting; self.live = set(); self.mutex = threading.Lock(); self.closing=False
        self.count = {"prompt_tokens": 0, "generated_tokens": 0, "preemptions": 0, "drafts": 0, "draft_tokens": 0, "accepted_draft_tokens": 0, "finished": {}}
    def submit(self, prompt, *, priority=0, out=None, **settings: Any):
        run = prepare(self.loaded, prompt, Options.of(**{**settings, "context": self.context}))
        if len(self.live) >= self.most or self.closing: raise Busy(f"{len(self.live)} texts")
        text = Text(self, run); self.live.add(text); self.count["prompt_tokens"] += len(run.prompt)
        threading.Thread(target=text.work, daemon=True).start()
        return text
    def figures(self): return {**self.count, "running": len(self.live), "waiting": 0, "kv_usage": 0.0}
    def close(self, drain_s=0.0):
        import time
        self.closing = True; end = time.monotonic() + drain_s
        while self.live and time.monotonic() < end: time.sleep(0.02)
        for t in list(self.live): t.cancel()
