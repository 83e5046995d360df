// The trusted half of a sandbox process: speaks with the host in lines of JSON, and starts the
// worker in which the model's code runs.
//
// The worker can reach this process's stdin and stdout. So every line to the host begins with a
// nonce, which is read before the worker exists; whatever comes without it is not ours. And what
// the worker says is data: it is checked here, and again by the host.
const encode = (text) => new TextEncoder().encode(text);
const settings = JSON.parse(readLine());

function readLine() {
  const bytes = [], buffer = new Uint8Array(1);
  while (Deno.stdin.readSync(buffer) && buffer[0] !== 10) bytes.push(buffer[0]);
  return new TextDecoder().decode(new Uint8Array(bytes));
}

function tell(message) {
  const line = encode("\n" + settings.nonce + JSON.stringify(message) + "\n");
  for (let done = 0; done < line.length;) done += Deno.stdout.writeSync(line.subarray(done));
}

function fail(error) {
  tell({ event: "failed", error: String(error?.message ?? error) });
  Deno.exit(1);
}

// ---- What both halves share --------------------------------------------------------------------
const interrupt = new Uint8Array(new SharedArrayBuffer(1)); // Python looks at it: 2 is SIGINT
const state = new Int32Array(new SharedArrayBuffer(8)); // [reply is there, its length]
const reply = new SharedArrayBuffer(65536, { maxByteLength: settings.message + 1024 });
let step = null; // the step that runs: its number
let calls = 0; // so far; only the last may be answered
let waiting = false; // the worker waits for an answer

function answer(text) {
  if (!waiting) return;
  waiting = false;
  const bytes = encode(text);
  if (bytes.length > reply.maxByteLength) return answerError("the result is too large");
  if (bytes.length > reply.byteLength) reply.grow(bytes.length);
  new Uint8Array(reply).set(bytes);
  Atomics.store(state, 1, bytes.length);
  Atomics.store(state, 0, 1);
  Atomics.notify(state, 0);
}

function answerError(error) {
  waiting = true;
  answer(JSON.stringify({ error, kind: "ToolError" }));
}

// ---- The worker --------------------------------------------------------------------------------
let worker;
function startWorker() {
  const none = { write: false, net: false, env: false, run: false, ffi: false, sys: false };
  worker = new Worker(new URL("worker.js", import.meta.url), {
    type: "module",
    deno: { permissions: { ...none, import: false, read: [settings.pyodide] } },
  });
  worker.onerror = (event) => { event.preventDefault(); fail(event.message); };
  worker.onmessage = ({ data }) => {
    if (Object.hasOwn(fromWorker, data?.event)) fromWorker[data.event](data);
  };
  const bytesOf = (name) => Deno.readFileSync(`${settings.built}/${name}`);
  const wheels = settings.wheels.map((name) => [name, bytesOf(name)]);
  const snapshot = bytesOf("snapshot.bin");
  const handedOver = [snapshot, ...wheels.map(([, bytes]) => bytes)].map((bytes) => bytes.buffer);
  worker.postMessage({
    kind: "load", interrupt, state, reply,
    pyodide: settings.pyodide, memory: settings.memory, output: settings.output,
    recursion: settings.recursion, packages: settings.packages,
    tools: JSON.stringify(settings.tools),
    steps: Deno.readTextFileSync(new URL("steps.py", import.meta.url)),
    snapshot, wheels,
  }, handedOver);
}

const fromWorker = {
  ready() {
    Deno.permissions.revokeSync({ name: "read" });
    tell({ event: "ready" });
  },
  failed({ error }) {
    fail(error);
  },
  call({ call }) {
    if (step === null || waiting || typeof call !== "string") return;
    waiting = true;
    calls += 1;
    if (call.length > settings.message) answerError("the arguments are too large");
    else tell({ event: "call", step, number: calls, call });
  },
  done({ output, total, error, interrupted, ended }) {
    if (step === null) return;
    tell({
      event: "done", step, output: String(output).slice(0, settings.output),
      total: Number(total) || 0, error: error == null ? null : String(error).slice(0, 20_000),
      interrupted: interrupted === true, ended: ended === true,
    });
    step = null;
    waiting = false;
    Atomics.store(interrupt, 0, 0);
  },
};

// ---- The host ----------------------------------------------------------------------------------
const fromHost = {
  run({ number, code }) {
    step = number;
    Atomics.store(interrupt, 0, 0);
    worker.postMessage({ kind: "run", number, code });
  },
  interrupt({ number }) {
    if (step !== number) return;
    Atomics.store(interrupt, 0, 2);
    if (waiting) answerError("interrupted");
    worker.postMessage({ kind: "interrupt", number }); // for code that awaits and runs no Python
  },
  answer({ number, text }) {
    if (number === calls) answer(text);
  },
};

try {
  startWorker();
} catch (error) {
  fail(error);
}
let unread = "";
for await (const text of Deno.stdin.readable.pipeThrough(new TextDecoderStream())) {
  const lines = (unread + text).split("\n");
  unread = lines.pop();
  for (const line of lines) {
    const message = JSON.parse(line);
    fromHost[message.kind](message);
  }
}
Deno.exit(0); // the host closed our stdin, or is no more
