-- A request that finds no engine waits for one that restarts: `limits.queue_while_restarting_s`.
--
-- Ray tells HAProxy of a replica by a new configuration, for which a new HAProxy takes over. So a
-- request that waits in the old one asks again there: var(txn.sere_again) is set. In vain was the
-- wait of one that has var(txn.sere_nobody). sere_ray/proxy/haproxy.py fills in the numbers.

local waiting = 0

local function is_any_up(backends)
    for backend in backends:gmatch("[^,]+") do
        for _, server in pairs(core.backends[backend].servers) do
            if server:get_stats().status:find("^UP") then
                return true
            end
        end
    end
    return false
end

core.register_action("sere_wait", { "http-req" }, function(txn, backends)
    if is_any_up(backends) then
        return
    end
    if waiting < ${PLACES} then
        waiting = waiting + 1
        local deadline = core.now().sec + ${SECONDS}
        while core.now().sec < deadline and not is_any_up(backends) do
            if tonumber(core.get_info().Stopping) == 1 then
                txn:set_var("txn.sere_again", 1)
                break
            end
            core.msleep(100)
        end
        waiting = waiting - 1
    end
    if not is_any_up(backends) then
        txn:set_var("txn.sere_nobody", 1)
    end
end, 1)
