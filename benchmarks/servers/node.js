// Socket.IO on Node with its defaults (the ws engine, no compression): node node.js PORT
// With REDIS_URL it is one of several, joined by the Redis adapter.
const { Server } = require("socket.io");

const io = new Server();

io.on("connection", (socket) => {
  socket.on("echo", (data) => socket.emit("echo", data));
  socket.on("broadcast", (data) => io.emit("broadcast", data));
});

async function join(url) {
  const { createClient } = require("redis");
  const { createAdapter } = require("@socket.io/redis-adapter");
  const publisher = createClient({ url });
  const subscriber = publisher.duplicate();
  await Promise.all([publisher.connect(), subscriber.connect()]);
  io.adapter(createAdapter(publisher, subscriber));
}

async function main() {
  if (process.env.REDIS_URL) {
    await join(process.env.REDIS_URL);
  }
  io.listen(Number(process.argv[2]), { host: "127.0.0.1" });
}

main();
