// The official client while workers are replaced: what it hears of it, and when it comes back.

import assert from "node:assert/strict";

import { collect, connected, extension, io, next, settled, subscribe, test } from "./support.mjs";

const ARBITER = Number(process.env.SOCKETIO_ARBITER);
const NUMBER = 20;
const USUAL = { reconnectionDelay: 1000, reconnectionDelayMax: 5000 };

/** Connect some, and keep when each went and came back. */
async function several(t, options, create) {
  const sockets = [];
  for (let i = 0; i < NUMBER; i += 1) {
    const socket = await connected(t, undefined, { ...USUAL, ...options }, create);
    socket.on("disconnect", (reason, details) => {
      Object.assign(socket, { reason, details, left: performance.now() });
    });
    socket.io.on("reconnect_attempt", () => {
      socket.tried ??= performance.now();
    });
    sockets.push(socket);
  }
  return sockets;
}

test("every client comes back by itself, and those who are told when, then", async (t) => {
  const official = await several(t, { transports: ["websocket"] }, io);
  const polling = await several(t, { transports: ["polling"] }, io);
  const ours = await several(t, {}, extension);
  for (const socket of ours) assert.deepEqual(await subscribe(socket, "room-1"), { ok: true });
  const all = [...official, ...polling, ...ours];
  const failures = [];
  for (const socket of all) {
    socket.io.on("reconnect_error", (error) => failures.push(error));
    socket.on("connect_error", (error) => failures.push(error));
  }

  const back = all.map((socket) => next(socket, "connect"));
  process.kill(ARBITER, "SIGHUP");
  await Promise.all(back);
  assert.deepEqual(failures, []);

  for (const socket of all) assert.equal(socket.reason, "transport close");
  for (const socket of [...official, ...ours]) {
    assert.equal(socket.details.context.code, 1012);
    const [, told] = /^service restart; reconnect after (\d+) ms$/.exec(
      socket.details.context.reason,
    );
    socket.told = Number(told);
  }
  for (const socket of ours) {
    // Half as long to one and a half times as long, as its randomizationFactor has it.
    assert.ok(socket.tried - socket.left > 0.5 * socket.told - 20);
    assert.equal(socket.io.reconnectionDelay(), USUAL.reconnectionDelay);
  }

  // What it was subscribed to, it is again.
  const heard = ours.map((socket) => collect(socket, "message"));
  for (const socket of ours) await settled(socket);
  ours[0].send("after it");
  await Promise.all(heard.map((messages) => messages.reaches(1)));
  assert.deepEqual(heard.map(([first]) => first), Array(NUMBER).fill("after it"));
});
