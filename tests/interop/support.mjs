// What the interop tests share: clients that end with their test, a server of one's own, and a wire
// that can be cut.

import { spawn } from "node:child_process";
import { once } from "node:events";
import { createRequire } from "node:module";
import net from "node:net";
import { test as nodeTest } from "node:test";

const require = createRequire(import.meta.url);

export const URL_OF_SERVER = required("SOCKETIO_URL");
export const io = require("../../django_socketio/static/django_socketio/socketio.js")(
  require("socket.io-client"),
);

function required(name) {
  if (!process.env[name])
    throw new Error(`${name} is not set; pytest tests/interop runs these tests`);
  return process.env[name];
}

/** A test with an end: what never comes fails it, by name, and not the whole run. */
export function test(name, fn) {
  nodeTest(name, { timeout: 30_000 }, fn);
}

/** Connect with the official client; `create` is `io` itself or, for the extension, `extension`. */
export function open(t, url = URL_OF_SERVER, options = {}, create = io) {
  const socket = create(url, {
    forceNew: true,
    reconnectionDelay: 20,
    reconnectionDelayMax: 200,
    ...options,
  });
  t.after(() => socket.io.disconnect()); // with every namespace on it
  return socket;
}

export const extension = (url, options) => new io.Socket(url, options);

export async function connected(t, ...args) {
  const socket = open(t, ...args);
  await new Promise((resolve, reject) => {
    socket.once("connect", resolve);
    socket.once("connect_error", reject);
  });
  return socket;
}

/** The arguments of the next event, as an array. */
export function next(emitter, event) {
  return new Promise((resolve) => emitter.once(event, (...args) => resolve(args)));
}

/** What comes with an event from now on, as an array; `reaches(n)` resolves when it holds n. */
export function collect(emitter, event) {
  const items = [];
  let check = () => {};
  emitter.on(event, (item) => {
    items.push(item);
    check();
  });
  items.reaches = (count) =>
    new Promise((resolve) => {
      check = () => items.length >= count && resolve(items);
      check();
    });
  return items;
}

/** The extension's methods, with the answer as the promise's value. */
export const subscribe = (socket, channel) =>
  new Promise((resolve) => socket.subscribe(channel, resolve));
export const unsubscribe = (socket, channel) =>
  new Promise((resolve) => socket.unsubscribe(channel, resolve));

/** Resolves when all that the server has sent on this connection until now has arrived. */
export const settled = (socket) => socket.emitWithAck("who am i");

/**
 * A wire between client and server: cut() ends every connection on it without a goodbye, down()
 * refuses new ones until up(). It holds a WebSocket's first bytes back for webSocketDelay
 * milliseconds; with refuseWebSocket it is one of those proxies that know no upgrade.
 */
export async function wire(t, { webSocketDelay = 0, refuseWebSocket = false } = {}) {
  const { hostname, port } = new URL(URL_OF_SERVER);
  const open = new Set();
  let refusing = false;
  const server = net.createServer((near) => {
    if (refusing) return near.resetAndDestroy();
    const far = net.connect(port, hostname);
    open.add(near).add(far);
    for (const [from, to] of [
      [near, far],
      [far, near],
    ]) {
      from.on("error", () => {});
      from.on("close", () => {
        open.delete(from);
        to.destroy();
      });
    }
    near.once("data", async (head) => {
      near.pause();
      if (/upgrade: websocket/i.test(head)) {
        if (refuseWebSocket) return near.destroy();
        await new Promise((resolve) => setTimeout(resolve, webSocketDelay));
      }
      far.write(head);
      near.pipe(far);
    });
    far.pipe(near);
  });
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  const cut = () => open.forEach((socket) => socket.destroy());
  t.after(() => {
    server.close();
    cut();
  });
  return {
    url: `http://127.0.0.1:${server.address().port}`,
    cut,
    down: () => {
      refusing = true;
      cut();
    },
    up: () => {
      refusing = false;
    },
  };
}

/** A server of the test's own, to end and start again on the same port. */
export async function ownServer(t) {
  const port = await freePort();
  const [command, ...args] = JSON.parse(required("SOCKETIO_SERVER_COMMAND"));
  let child;
  const server = {
    url: `http://127.0.0.1:${port}`,
    async start() {
      child = spawn(
        command,
        args.map((arg) => arg.replace("{port}", port)),
        { stdio: ["ignore", "inherit", "inherit"] },
      );
      const ended = () => child.exitCode !== null || child.signalCode !== null;
      while (!(await answers(port))) {
        if (ended()) throw new Error(`the server ended with ${child.exitCode ?? child.signalCode}`);
        await new Promise((resolve) => setTimeout(resolve, 50));
      }
    },
    async stop(signal = "SIGTERM") {
      if (child.exitCode !== null || child.signalCode !== null) return;
      child.kill(signal);
      await once(child, "exit");
    },
  };
  t.after(() => server.stop("SIGKILL"));
  await server.start();
  return server;
}

async function freePort() {
  const server = net.createServer().listen(0, "127.0.0.1");
  await once(server, "listening");
  const { port } = server.address();
  server.close();
  await once(server, "close");
  return port;
}

async function answers(port) {
  const socket = net.connect(port, "127.0.0.1");
  const answered = await new Promise((resolve) => {
    socket.once("connect", () => resolve(true));
    socket.once("error", () => resolve(false));
  });
  socket.destroy();
  return answered;
}
