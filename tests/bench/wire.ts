/**
 * A long wire: a TCP proxy through which every byte arrives later, for the benches.
 *
 * ```sh
 * bun tests/bench/wire.ts 2121 50     # to port 2121, 50 ms each way; prints its own port
 * ```
 *
 * A process of its own, so that it takes no time from the bench. Each chunk goes on as long after its arrival as the
 * wire is long, however many are on their way: it delays and does not limit. It has no windows and no slow start, so it
 * is kinder than a real one to whoever sends much at once; a connection costs its round trip, as on a real one.
 */
import { createServer, Socket } from "node:net";

/** What may be on the way in one direction: 2.5 GB/s at 100 ms. Above it the reader is the limit, and is waited for. */
const IN_FLIGHT_BYTES = 256 * 2 ** 20;

/** A wire to `port` as a process; ends when it goes out of scope. */
export async function startWire(port: number, delay_ms: number): Promise<{ port: number } & AsyncDisposable> {
  const child = Bun.spawn([process.execPath, import.meta.path, String(port), String(delay_ms)], {
    stdio: ["ignore", "pipe", "inherit"],
  });
  const { value } = await child.stdout.getReader().read();
  return {
    port: Number(new TextDecoder().decode(value)),
    async [Symbol.asyncDispose]() {
      child.kill("SIGTERM");
      await child.exited;
    },
  };
}

/** Passes on what `from` sends, each piece `delay_ms` after it came, and its end likewise. */
function carry(from: Socket, to: Socket, delay_ms: number): void {
  const waiting: Buffer[] = [];
  let inFlight = 0;
  const arrived = (length: number) => {
    inFlight -= length;
    if (inFlight <= IN_FLIGHT_BYTES) from.resume();
  };
  // A timer for each piece, and each sends the first that waits: in order, whatever the order of the timers.
  const sendNext = () => {
    const bytes = waiting.shift()!;
    to.write(bytes, () => arrived(bytes.length));
  };
  from.on("data", (bytes: Buffer) => {
    waiting.push(bytes);
    inFlight += bytes.length;
    if (inFlight > IN_FLIGHT_BYTES) from.pause();
    setTimeout(sendNext, delay_ms);
  });
  from.on("end", () => setTimeout(() => to.end(), delay_ms));
  from.on("error", () => setTimeout(() => to.destroy(), delay_ms));
}

function accept(near: Socket, port: number, delay_ms: number): void {
  const far = new Socket({ allowHalfOpen: true });
  far.setNoDelay(true);
  // The far side sees the connection one way later than its last packet left, the near side may send a round trip after
  // its first.
  setTimeout(() => {
    setTimeout(() => far.connect(port, "127.0.0.1"), delay_ms);
    carry(near, far, delay_ms);
    carry(far, near, delay_ms);
    near.resume();
  }, 2 * delay_ms);
}

if (import.meta.main) {
  const [port, delay_ms] = process.argv.slice(2).map(Number) as [number, number];
  const options = { allowHalfOpen: true, noDelay: true, pauseOnConnect: true };
  const server = createServer(options, (near) => accept(near, port, delay_ms));
  server.listen(0, "127.0.0.1", () => console.log((server.address() as { port: number }).port));
}
