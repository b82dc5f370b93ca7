// Socket.IO on Node with its defaults (the ws engine, no compression): node node.js PORT
const { Server } = require("socket.io");

const io = new Server();

io.on("connection", (socket) => {
  socket.on("echo", (data) => socket.emit("echo", data));
  socket.on("broadcast", (data) => io.emit("broadcast", data));
});

io.listen(Number(process.argv[2]), { host: "127.0.0.1" });
