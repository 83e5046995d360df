// What langchain-sandbox's own script does for one call, with the wheels placed, so that it needs
// no network: start Pyodide from its files, unpack the wheels, run the code, print JSON, exit.
const [pyodide, code, ...wheels] = Deno.args;
const { loadPyodide } = await import("file://" + pyodide + "/pyodide.mjs");
const printed = [];
const python = await loadPyodide({
  indexURL: pyodide + "/", checkAPIVersion: false, stdout: (line) => printed.push(line),
});
for (const wheel of wheels) python.unpackArchive(Deno.readFileSync(wheel), "wheel");
await python.runPythonAsync(code);
console.log(JSON.stringify({ success: true, stdout: printed.join("\n") }));
Deno.exit(0);
