// llama.cpp, as node-llama-cpp builds it, on one exported GGUF file: what python_readers.py says.
//
//     node benchmarks/export_readers/llama_cpp.mjs NODE FOLDER REQUEST OUT
//
// NODE is a folder in which `npm install node-llama-cpp` was run.
import fs from "node:fs";
import path from "node:path";
import {pathToFileURL} from "node:url";

const [node, folder, request, out] = process.argv.slice(2);
const place = path.join(path.resolve(node), "node_modules/node-llama-cpp");
const entry = path.join(place, JSON.parse(fs.readFileSync(path.join(place, "package.json"))).main);
const {getLlama} = await import(pathToFileURL(entry));
const {prompts, new: count} = JSON.parse(fs.readFileSync(request));

const llama = await getLlama({gpu: false, build: "never", progressLogs: false, logLevel: "error"});
const model = await llama.loadModel({modelPath: path.join(folder, "model.gguf"), gpuLayers: 0});
const context = await model.createContext({contextSize: 256, threads: 2});
const sequence = context.getSequence();

const best = (logits) => {
    let found;
    for (const [token, value] of logits)
        if (found === undefined || value > found[1])
            found = [token, value];
    return found[0];
};

const tokens = [];
for (const [i, prompt] of prompts.entries()) {
    await sequence.clearHistory();
    const asked = prompt.map((token) => [token, {generateNext: {logits: true}}]);
    const outputs = await sequence.controlledEvaluate(asked);
    const file = fs.openSync(path.join(out, `${i}.f32`), "w");
    for (const {next} of outputs) {
        const row = new Float32Array(next.logits.size);
        for (const [token, value] of next.logits)
            row[token] = value;
        const most = row.reduce((a, b) => Math.max(a, b));
        const sum = row.reduce((a, b) => a + Math.exp(b - most), 0);
        fs.writeSync(file, row.map((value) => value - most - Math.log(sum)));
    }
    fs.closeSync(file);
    const found = [best(outputs.at(-1).next.logits)];
    while (found.length < count) {
        const [output] = await sequence.controlledEvaluate(
            [[found.at(-1), {generateNext: {logits: true}}]]
        );
        found.push(best(output.next.logits));
    }
    tokens.push(found);
}
const release = JSON.parse(fs.readFileSync(path.join(place, "package.json"))).version;
fs.writeFileSync(path.join(out, "library.txt"), `llama.cpp (node-llama-cpp ${release})`);
fs.writeFileSync(path.join(out, "tokens.json"), JSON.stringify(tokens));
await llama.dispose();
process.exit(0);
