// The half of a sandbox process in which the model's code runs: Pyodide in a Deno worker.
//
// Python here reaches all of JavaScript (`import js`). Nothing in this file is a boundary; the
// boundary is that the worker has no permission once it is ready, and that the process can be
// ended. Memory alone is bounded here too, so that Python sees a MemoryError and lives on.
let steps, interrupt, state, reply, limit, running = null;
const written = { chunks: [], size: 0 }; // past Python's sys.stdout: os.write(1, …), console.log

self.onmessage = async ({ data }) => {
  if (data.kind === "load") {
    try {
      await load(data);
      self.postMessage({ event: "ready" });
    } catch (error) {
      self.postMessage({ event: "failed", error: String(error?.stack ?? error) });
    }
  } else if (data.kind === "run") {
    await run(data);
  } else if (data.kind === "interrupt" && running === data.number) {
    Atomics.store(interrupt, 0, 0);
    steps.cancel();
  }
};

async function load(settings) {
  ({ interrupt, state, reply } = settings);
  limit = settings.output;
  capMemory(settings.memory);
  const folder = "file://" + encodeURI(settings.pyodide);
  const { loadPyodide } = await import(folder + "/pyodide.mjs");
  const { default: create } = await import(folder + "/pyodide.asm.mjs");
  const python = await loadPyodide({
    indexURL: settings.pyodide + "/",
    checkAPIVersion: false,
    env: { HOME: "/home/pyodide", PYTHONHASHSEED: "0" },
    _loadSnapshot: settings.snapshot,
    createPyodideModule: async (options) => {
      const module = await create(options);
      // Grows the memory to what the snapshot takes, which then overwrites it, malloc's notes too.
      module._malloc(settings.snapshot.length);
      return module;
    },
  });
  const write = (bytes) => {
    if (written.size < limit) written.chunks.push(bytes.slice(0, limit));
    written.size += bytes.length;
    return bytes.length;
  };
  python.setStdin({ error: true });
  python.setStdout({ write, isatty: false });
  python.setStderr({ write, isatty: false });
  python.FS.mkdirTree("/lib/wheels");
  for (const [name, bytes] of settings.wheels) {
    python.FS.writeFile("/lib/wheels/" + name, bytes, { canOwn: true });
  }
  python.FS.writeFile("/lib/wheels/_steps.py", settings.steps);
  python.registerJsModule("_host", { call, sleep });
  python.runPython("import sys; sys.path.append('/lib/wheels')");
  steps = python.pyimport("_steps");
  python.runPython("sys.path.remove('/lib/wheels'); del sys");
  const seed = crypto.getRandomValues(new Uint8Array(16)).join(".");
  steps.prepare(settings.tools, settings.output, settings.recursion, settings.packages, seed);
  python.setInterruptBuffer(interrupt);
  await Deno.permissions.revoke({ name: "read", path: settings.pyodide });
  await Deno.permissions.revoke({ name: "read" });
}

function capMemory(bytes) {
  const grow = WebAssembly.Memory.prototype.grow;
  WebAssembly.Memory.prototype.grow = function (pages) {
    if (this.buffer.byteLength + pages * 65536 > bytes) throw new RangeError("memory limit");
    return grow.call(this, pages);
  };
  Object.freeze(WebAssembly.Memory.prototype);
}

async function run({ number, code }) {
  running = number;
  let result;
  try {
    result = JSON.parse(await steps.run(code));
  } catch (error) {
    const text = String(error?.message ?? error);
    const interrupted = text.includes("KeyboardInterrupt"); // it came while the result was made
    result = { output: "", total: 0, error: text, interrupted, ended: !interrupted };
  }
  running = null;
  const more = written.chunks.map((chunk) => new TextDecoder().decode(chunk)).join("");
  result.output += more;
  result.total += written.size;
  written.chunks = [];
  written.size = 0;
  self.postMessage({ event: "done", ...result });
}

function call(text) { // what a tool's stub calls; the host's answer, as text
  Atomics.store(state, 0, 0);
  self.postMessage({ event: "call", call: text });
  Atomics.wait(state, 0, 0);
  return new TextDecoder().decode(new Uint8Array(reply, 0, Atomics.load(state, 1)).slice());
}

function sleep(milliseconds) { // whether it was interrupted
  const clock = new Int32Array(new SharedArrayBuffer(4));
  for (const end = performance.now() + milliseconds; performance.now() < end;) {
    if (Atomics.exchange(interrupt, 0, 0) === 2) return true;
    Atomics.wait(clock, 0, 0, Math.min(20, end - performance.now()));
  }
  return false;
}
