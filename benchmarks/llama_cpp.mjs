// llama.cpp as a contender of benchmarks/generation.py, by node-llama-cpp's prebuilt library: answers its commands.
// Arguments: the .gguf, the number of sequences, threads, and node_modules/node-llama-cpp/dist/index.js.
import {createInterface} from "node:readline";
import {pathToFileURL} from "node:url";

const [model_path, slots, threads, library] = process.argv.slice(2);
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(library).href);
const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error, maxThreads: Number(threads)});
const model = await llama.loadModel({modelPath: model_path});
const context = await model.createContext({
    sequences: Number(slots), contextSize: 640, batchSize: 512, threads: Number(threads)
});
const sequences = Array.from({length: Number(slots)}, () => context.getSequence());

async function generate(sequence, ids, count) {
    await sequence.clearHistory();
    let drawn = 0;
    // Greedy at temperature 0; an end token is one token more, as for all contenders.
    for await (const _ of sequence.evaluate(ids, {temperature: 0, yieldEogToken: true})) if (++drawn >= count) break;
    if (drawn < count) throw new Error(`${drawn} tokens of ${count}`);
}

console.log(JSON.stringify({arrivals: false}));
for await (const line of createInterface({input: process.stdin})) {
    const {prompts, new: count} = JSON.parse(line);
    const began = performance.now();
    await Promise.all(prompts.map((ids, row) => generate(sequences[row], ids, count)));
    console.log(JSON.stringify([(performance.now() - began) / 1000, process.resourceUsage().maxRSS / 1024]));
}
