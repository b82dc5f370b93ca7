// The official client against several workers, of which each of its connections finds another.

import assert from "node:assert/strict";
import { once } from "node:events";
import http from "node:http";
import net from "node:net";

import { collect, connected, next, test } from "./support.mjs";

/** Their urls and pids; several may be behind one. `apart`: each is a host of its own. */
const workers = JSON.parse(process.env.SOCKETIO_WORKERS);
const apart = process.env.SOCKETIO_APART === "yes";

for (const worker of workers)
  worker.node = (await (await fetch(`${worker.url}/socket.io/health`)).json()).node;
const ownerOf = (socket) => workers.find(({ node }) => socket.io.engine.id.startsWith(node));
const living = () => workers.filter((worker) => !worker.dead);
const anybody = () => pick(living());

const pick = (list) => list[Math.floor(Math.random() * list.length)];
const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));
const transportOf = (socket) => socket.io.engine.transport.name;

/** A balancer that takes each connection to the worker that `choose()` names. */
async function balancer(t, choose) {
  const open = new Set();
  const server = net.createServer((near) => {
    const far = net.connect(new URL(choose().url).port, "127.0.0.1");
    for (const [from, to] of [
      [near, far],
      [far, near],
    ]) {
      open.add(from);
      from.on("error", () => {});
      from.on("close", () => {
        open.delete(from);
        to.destroy();
      });
      from.pipe(to);
    }
  });
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  t.after(() => {
    server.close();
    open.forEach((socket) => socket.destroy());
  });
  return `http://127.0.0.1:${server.address().port}`;
}

/** Send numbers both ways at once; each must arrive once, and in order. */
async function numbersBothWays(socket, count) {
  const ticks = collect(socket, "tick");
  socket.emit("start ticking");
  for (let i = 0; i < count; i += 1) {
    socket.emit("note", i);
    if (i % 40 === 0) await pause(5);
  }
  const notes = await socket.emitWithAck("notes");
  const ticked = await socket.emitWithAck("stop ticking");
  await ticks.reaches(ticked);
  socket.off("tick");
  assert.deepEqual(
    notes,
    Array.from({ length: count }, (_, i) => i),
  );
  assert.deepEqual(
    [...ticks],
    Array.from({ length: ticked }, (_, i) => i),
  );
}

/**
 * Resolves when the socket works: whoever polled through a worker that is gone may notice late.
 */
async function recovered(socket) {
  for (;;) {
    if (!socket.connected) await next(socket, "connect");
    const disconnected = next(socket, "disconnect").then(() => "disconnected");
    const outcome = await Promise.race([numbersBothWays(socket, 100), disconnected]);
    if (outcome !== "disconnected") return;
  }
}

const AGENTS = [
  ["a connection for each request", () => ({})],
  ["connections that are kept", () => ({ agent: new http.Agent({ keepAlive: true }) })],
];

for (const [name, agent] of AGENTS) {
  const POLLING = { transports: ["polling"] };

  test(`polling, ${name}: numbers both ways`, async (t) => {
    const url = await balancer(t, anybody);
    const sockets = [];
    for (let i = 0; i < 4; i += 1)
      sockets.push(await connected(t, url, { ...POLLING, ...agent() }));
    await Promise.all(sockets.map((socket) => numbersBothWays(socket, 2000)));
    for (const socket of sockets) assert.equal(transportOf(socket), "polling");
  });

  test(`polling, ${name}: text and binary of any size`, async (t) => {
    const url = await balancer(t, anybody);
    const socket = await connected(t, url, { ...POLLING, ...agent() });
    for (const size of [0, 1, 1000, 20_000, 300_000, 675_000]) {
      for (const value of ["x".repeat(size), Buffer.alloc(size, "binary")]) {
        const echoed = next(socket, "message");
        socket.send(value);
        assert.deepEqual(await echoed, [value]);
      }
    }
  });

  test(`upgrade, ${name}: numbers both ways`, async (t) => {
    const url = await balancer(t, anybody);
    for (let round = 0; round < 4; round += 1) {
      const options = { transports: ["polling", "websocket"], ...agent() };
      const socket = await connected(t, url, options);
      await numbersBothWays(socket, 1000);
      if (!apart) assert.equal(transportOf(socket), "websocket");
      await numbersBothWays(socket, 1000);
    }
  });

  if (workers.length === 1) continue; // which one there ends is not for us to say

  test(`reconnection, ${name}: after the end of a worker`, async (t) => {
    const url = await balancer(t, anybody);
    const sockets = [];
    for (let i = 0; i < 8; i += 1)
      sockets.push(await connected(t, url, { ...POLLING, ...agent() }));
    const victim = ownerOf(sockets[0]);
    const bereaved = sockets.filter((socket) => ownerOf(socket) === victim);
    const ended = bereaved.map((socket) => next(socket, "disconnect"));
    const again = bereaved.map((socket) => next(socket, "connect"));
    victim.dead = true;
    process.kill(victim.pid, "SIGKILL");
    await Promise.all([...ended, ...again]);
    for (const socket of sockets) await recovered(socket);
  });
}

test("websocket only: any worker will do", async (t) => {
  const url = await balancer(t, anybody);
  const socket = await connected(t, url, { transports: ["websocket"] });
  await numbersBothWays(socket, 1000);
});

if (apart)
  test("an upgrade that lands on another host is declined, and polling goes on", async (t) => {
    const [home, away] = living();
    let connections = 0;
    const url = await balancer(t, () => (connections++ ? away : home));
    const socket = await connected(t, url, { transports: ["polling", "websocket"] });
    assert.equal(ownerOf(socket), home);
    await numbersBothWays(socket, 1000);

    assert.equal(transportOf(socket), "polling");
    await numbersBothWays(socket, 1000);
  });
