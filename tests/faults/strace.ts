/**
 * System calls that fail on purpose, by strace: in a process that runs already, or in a command from its start.
 *
 * A fault is the Nth call of one name, counted in each thread for itself, which is how strace counts. What really became
 * of it is read from the trace, where strace marks the call, so that a fault which met nothing is known.
 */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { temporaryFolder, waitFor } from "../fixtures.ts";

/** A line of the trace, its two halves joined where another thread came between. */
export interface Call {
  thread: number;
  name: string;
  /** All of the line behind the name, with the paths of descriptors. */
  text: string;
  /** Not made by the kernel, but answered by strace. */
  injected: boolean;
  failed: boolean;
}

export interface Fault {
  call: string;
  /** As strace has it: `error=EIO`, `retval=1`. */
  how: string;
  /** Which one, from 1, in any thread. */
  at: number;
}

export interface TraceOptions {
  /** Names of calls to see; the faulty one is seen in any case. */
  calls: readonly string[];
  fault?: Fault | undefined;
}

/** Why there are no such tests here, if so: under another tracer, or where ptrace is forbidden, strace only fails. */
export async function whyNoStrace(): Promise<string | undefined> {
  if (!Bun.which("strace")) return "strace is not installed";
  const child = Bun.spawn(["sleep", "60"]);
  try {
    await using _ = await attach(child.pid, { calls: ["read"] });
    return undefined;
  } catch {
    return "strace may not attach to processes here";
  } finally {
    child.kill("SIGKILL");
  }
}

function argumentsFor({ calls, fault }: TraceOptions, output: string): string[] {
  // With the mark, names that this architecture does not have are passed over.
  const names = [...new Set(fault ? [...calls, fault.call] : calls)].map((name) => `?${name}`);
  const inject = fault ? ["-e", `inject=${fault.call}:${fault.how}:when=${fault.at}`] : [];
  return ["-f", "-y", "-s", "0", "-o", output, "-e", `trace=${names.join(",")}`, ...inject];
}

export interface Tracing extends AsyncDisposable {
  /** Lets the process go on untraced; what it called meanwhile. */
  stop(): Promise<Call[]>;
}

/** Returns when all threads of the process are watched. */
export async function attach(pid: number, options: TraceOptions): Promise<Tracing> {
  const folder = temporaryFolder();
  const output = join(folder.path, "trace");
  const strace = Bun.spawn(["strace", ...argumentsFor(options, output), "-p", String(pid)], {
    stdio: ["ignore", "ignore", "pipe"],
  });
  let said = "";
  const reading = (async () => {
    for await (const text of strace.stderr.pipeThrough(new TextDecoderStream())) said += text;
  })();
  const end = async () => {
    strace.kill("SIGINT");
    await Promise.all([strace.exited, reading]);
  };
  try {
    await waitFor("strace is attached", () => /attached/.test(said) || strace.exitCode !== null);
    if (strace.exitCode !== null) throw new Error(`strace failed: ${said}`);
  } catch (error) {
    await end();
    folder[Symbol.dispose]();
    throw error;
  }
  return {
    async stop() {
      await end();
      return parseTrace(readFileSync(output, "utf8"));
    },
    async [Symbol.asyncDispose]() {
      await end();
      folder[Symbol.dispose]();
    },
  };
}

/** Words to put before a command; `calls` is read when it has ended. */
export function traced(options: TraceOptions): { runBy: string[]; calls(): Call[] } & Disposable {
  const folder = temporaryFolder();
  const output = join(folder.path, "trace");
  return {
    // The filter in the kernel lets all other calls run at their own speed.
    runBy: ["strace", "--seccomp-bpf", ...argumentsFor(options, output)],
    calls: () => parseTrace(readFileSync(output, "utf8")),
    [Symbol.dispose]: () => folder[Symbol.dispose](),
  };
}

const UNFINISHED = " <unfinished ...>";

/** `4711 fsync(12</srv/f>) = -1 EIO (Input/output error) (INJECTED)`, in one line or two. */
export function parseTrace(trace: string): Call[] {
  const calls: Call[] = [];
  const begun = new Map<number, string>();
  for (const line of trace.split("\n")) {
    const [, pid, rest] = /^(\d+) +(.*)$/.exec(line) ?? [];
    if (pid === undefined || rest === undefined) continue;
    const thread = Number(pid);
    if (rest.endsWith(UNFINISHED)) {
      begun.set(thread, rest.slice(0, -UNFINISHED.length));
      continue;
    }
    const [, resumed] = /^<\.\.\. \w+ resumed>(.*)$/.exec(rest) ?? [];
    const whole = resumed === undefined ? rest : (begun.get(thread) ?? "") + resumed;
    const [, name, text] = /^(\w+)(\(.*)$/.exec(whole) ?? [];
    if (name === undefined || text === undefined) continue;
    calls.push({ thread, name, text, injected: /\(INJECTED\)$/.test(text), failed: /\) += -1 /.test(text) });
  }
  return calls;
}
