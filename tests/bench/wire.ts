/**
 * A long wire: the proxy of ../faults/proxy.ts, through which every byte arrives later, for the benches.
 *
 * ```sh
 * bun tests/bench/wire.ts 2121 50     # to port 2121, 50 ms each way; prints its own port
 * ```
 *
 * A process of its own, so that it takes no time from the bench. Each chunk goes on as long after its arrival as the
 * wire is long, however many are on their way: it delays and does not limit. It has no windows and no slow start, so it
 * is kinder than a real one to whoever sends much at once; a connection costs its round trip, as on a real one.
 */
import { startProxy } from "../faults/proxy.ts";

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

if (import.meta.main) {
  const [target, delay_ms] = process.argv.slice(2).map(Number) as [number, number];
  const way = { delay_ms };
  console.log(startProxy({ target, spoil: () => ({ toClient: way, toServer: way }) }).port);
}
