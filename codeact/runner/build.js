// The part of the install step that needs Pyodide; codeact/install.py calls it, twice:
//   deno run … build.js '{"pyodide": …, "out": …, "wheels": [PATH, …]}'    wheels to OUT/NAME.zip
//   deno run … build.js '{"pyodide": …, "out": …, "preload": [NAME, …], "warmUp": CODE}'
//                    OUT/snapshot.bin
// It runs before any model's code exists, so it may read, and write OUT.
const { pyodide, out, wheels, preload, warmUp } = JSON.parse(Deno.args[0]);
const { loadPyodide } = await import("file://" + encodeURI(pyodide) + "/pyodide.mjs");
const python = await loadPyodide({
  indexURL: pyodide + "/",
  checkAPIVersion: false,
  env: { HOME: "/home/pyodide", PYTHONHASHSEED: "0" },
  _makeSnapshot: Boolean(preload),
});

// A wheel holds sources only. Imported from bytecode, sympy is there in a third of the time.
function compileWheel(path) {
  const name = path.split("/").pop().replace(/\.whl$/, ".zip");
  python.FS.writeFile("/tmp/given", Deno.readFileSync(path));
  python.runPython(`
import importlib.util, marshal, warnings, zipfile

def compiled(path, source):
    """Bytecode that Python takes without looking at the source's date (PEP 552, unchecked)."""
    code = compile(source, path, "exec", dont_inherit=True)
    header = importlib.util.MAGIC_NUMBER + b"\\x01\\0\\0\\0" + importlib.util.source_hash(source)
    return header + marshal.dumps(code)

with zipfile.ZipFile("/tmp/given") as given, \\
        zipfile.ZipFile("/tmp/made", "w", zipfile.ZIP_DEFLATED) as made:
    for name in given.namelist():
        data = given.read(name)
        if "/tests/" not in name:
            made.writestr(name, data)
            if name.endswith(".py"):
                try:
                    with warnings.catch_warnings(action="ignore", category=SyntaxWarning):
                        made.writestr(name + "c", compiled("/lib/wheels/${name}/" + name, data))
                except SyntaxError:
                    pass  # a file for another Python stays a source
`);
  Deno.writeFileSync(`${out}/${name}`, python.FS.readFile("/tmp/made"));
}

function takeSnapshot() {
  python.FS.mkdirTree("/lib/wheels");
  for (const { name } of Deno.readDirSync(out)) {
    if (name.endsWith(".zip")) {
      python.FS.writeFile("/lib/wheels/" + name, Deno.readFileSync(`${out}/${name}`));
      python.runPython(`import sys; sys.path.append("/lib/wheels/${name}"); del sys`);
    }
  }
  python.runPython(preload.map((name) => `import ${name}; del ${name}`).join("\n"));
  python.runPython(warmUp, { globals: python.toPy({}) });
  python.runPython("import gc; gc.collect(); del gc");
  Deno.writeFileSync(`${out}/snapshot.bin`, python.makeMemorySnapshot());
}

if (preload) takeSnapshot();
else wheels.forEach(compileWheel);
Deno.exit(0); // Pyodide's timers would keep the process
