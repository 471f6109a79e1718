/** The soak, short: a fixed number of kills with a fixed seed. `bun run soak` does it for as long as one likes. */
import { expect, setDefaultTimeout, test } from "bun:test";
import { TEST_MS } from "../fixtures.ts";
import { soak } from "./soak.ts";

setDefaultTimeout(TEST_MS);

const SEED = Number(process.env.SEED ?? 20_261_122);
const KILLS = 30;

test("30 kills of clients, workers and servers while 8 clients download and upload: nothing wrong, nothing left", async () => {
  const report = await soak({
    seed: SEED,
    minutes: Number.POSITIVE_INFINITY,
    kills: KILLS,
    clients: 8,
    pauseMs: [50, 700],
    backMs: Number.POSITIVE_INFINITY,
    say() {},
  });
  expect([SEED, report.faults]).toEqual([SEED, []]);
  expect(report.kills).toBe(KILLS);
});
