// The official parser behind a pipe. A line of standard input is one question in JSON, a line of
// standard output its answer: {"encode": packet} is answered with the packet's messages,
// {"decode": messages} with the packet that they are, or with {"error": ...}.
// In either, {[BYTES]: hex} stands for a Buffer.

import { createInterface } from "node:readline";
import { Decoder, Encoder } from "socket.io-parser";

const BYTES = "bytes, in hex";
const [maxAttachments] = process.argv.slice(2).map(Number);

function revive(key, value) {
  return typeof value?.[BYTES] === "string" ? Buffer.from(value[BYTES], "hex") : value;
}

function replace(key, value) {
  // Buffers have been replaced by their toJSON() already, but not in what holds them.
  return Buffer.isBuffer(this[key]) ? { [BYTES]: this[key].toString("hex") } : value;
}

function decode(messages) {
  const decoder = new Decoder({ maxAttachments });
  const packets = [];
  decoder.on("decoded", (packet) => packets.push(packet));
  messages.forEach((message) => decoder.add(message));
  if (packets.length !== 1) throw new Error(`${packets.length} packets`);
  return packets[0];
}

function answer({ encode, decode: messages }) {
  try {
    return encode ? new Encoder().encode(encode) : decode(messages);
  } catch (error) {
    return { error: error.message };
  }
}

for await (const line of createInterface({ input: process.stdin })) {
  process.stdout.write(`${JSON.stringify(answer(JSON.parse(line, revive)), replace)}\n`);
}
