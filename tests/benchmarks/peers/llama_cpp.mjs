// llama.cpp through node-llama-cpp, one request at a time: node llama_cpp.mjs PACKAGE_FOLDER GGUF_FILE THREADS
// Speaks tests/benchmarks/protocol.py; the prompts' tokens come from another generator than Python's.

import {createInterface} from "node:readline";
import {resolve} from "node:path";
import {pathToFileURL} from "node:url";

const CONTEXT_LENGTH = 1024;
const NUM_SPECIAL_TOKENS = 3;
const [packageFolder, modelPath, threads] = process.argv.slice(2);
const answer = (object) => process.stdout.write(JSON.stringify(object) + "\n");
const wallSeconds = () => performance.now() / 1e3;

function cpuSeconds() {
    const {user, system} = process.cpuUsage();
    return (user + system) / 1e6;
}

// mulberry32
function randomSource(seed) {
    return () => {
        seed = (seed + 0x6d2b79f5) | 0;
        let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
        t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
        return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
    };
}

async function play(sequence, vocabSize, request) {
    if (request.concurrency !== 1)
        throw new Error("this peer runs one request at a time");
    const random = randomSource(request.seed);
    const prompt = Array.from(
        {length: request.prompt_tokens},
        () => NUM_SPECIAL_TOKENS + Math.floor(random() * (vocabSize - NUM_SPECIAL_TOKENS))
    );
    await sequence.clearHistory();
    const [start, startCpu] = [wallSeconds(), cpuSeconds()];
    let first, firstCpu, tokens = 0;
    for await (const _ of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
        tokens += 1;
        if (tokens === 1)
            [first, firstCpu] = [wallSeconds(), cpuSeconds()];
        if (tokens === request.new_tokens)
            break;
    }
    const [end, endCpu] = [wallSeconds(), cpuSeconds()];
    return {
        ttft_s: [first - start],
        decode_s: end - first,
        decode_cpu_s: endCpu - firstCpu,
        decode_tokens: tokens - 1,
        wall_s: end - start,
        cpu_s: endCpu - startCpu,
        tokens
    };
}

const entry = resolve(packageFolder, "node_modules/node-llama-cpp/dist/index.js");
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(entry));
const llama = await getLlama({
    gpu: false, build: "never", logLevel: LlamaLogLevel.error, maxThreads: Number(threads)
});
const model = await llama.loadModel({modelPath});
const context = await model.createContext({contextSize: CONTEXT_LENGTH, threads: Number(threads)});
const sequence = context.getSequence();
const vocabSize = model.fileInfo.metadata.llama.vocab_size;

answer({ready: true});
for await (const line of createInterface({input: process.stdin}))
    answer(await play(sequence, vocabSize, JSON.parse(line)));
process.exit(0);
